"""How many samples remote shards gave, kept on disk, so that a run that goes on need not read them again."""

from __future__ import annotations

import contextlib
import hashlib
import json

from guided_mt.data.sources.cache import listings_folder

from .index import SampleRule

FILE = "remote_counts.jsonl"


class Counts:
    """{shard: how many of its samples pass a rule's filters}, of those that some process has read to the end.

    An aid alone: where a count is missing, or nothing can be written, shards are read through.
    """

    def __init__(self, rule: SampleRule):
        self._rule = f"{rule.filters.bounds} {rule.filters.quantities}"
        folder = listings_folder()
        self._file = None if folder is None else folder / "shards" / FILE
        self._known: dict[str, int] = {}
        if self._file is not None:
            with contextlib.suppress(OSError), open(self._file, encoding="utf-8") as lines:
                for line in lines:
                    with contextlib.suppress(ValueError, TypeError):
                        key, count = json.loads(line)
                        self._known[str(key)] = int(count)

    def get(self, shard: str) -> int | None:
        """None where it isn't known."""
        return self._known.get(self._key(shard))

    def put(self, shard: str, count: int) -> None:
        """Written as one short line, which is whole for whoever reads beside."""
        if self.get(shard) == count:
            return
        self._known[self._key(shard)] = count
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._file, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps([self._key(shard), count]) + "\n")

    def _key(self, shard: str) -> str:
        return hashlib.sha256(f"{shard}\n{self._rule}".encode()).hexdigest()[:32]
