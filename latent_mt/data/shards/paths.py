"""Which shards a YAML file names: patterns such as {00000..00099}.tar, lists of them, folders, addresses and commands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from guided_mt.errors import UserError, nearest

_REMOTE = re.compile(r"^(pipe:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


def is_remote(shard: str) -> bool:
    """Whether a shard is read as a stream: from an address, or from what a command prints (pipe:COMMAND)."""
    return _REMOTE.match(shard) is not None


def shards_of(path: str | Sequence[str]) -> list[str]:
    """The shards that `path` names, each once, in the order in which they stand there.

    Raises UserError where there are none, one is named twice, or local and remote ones are mixed.
    """
    words = [path] if isinstance(path, str) else list(path) if isinstance(path, Sequence) else []
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise UserError(
            f"data.params.path {path!r}: name shards (data/{{00000..00099}}.tar), a folder of them, or a list"
        )
    shards = [shard for word in words for shard in _expanded(word)]
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"data.params.path: {shard} is named twice; each shard is to come once per epoch")
        seen.add(shard)
    remote = [is_remote(shard) for shard in shards]
    if any(remote) and not all(remote):
        raise UserError(
            f"data.params.path: {shards[remote.index(True)]} is remote and {shards[remote.index(False)]} is a file; "
            f"they are read in different ways, so take one kind"
        )
    return shards


def _expanded(word: str) -> list[str]:
    place = Path(word).expanduser()
    if not is_remote(word):
        if place.is_dir():
            found = sorted(str(file) for file in place.glob("*.tar"))
            if not found:
                raise UserError(
                    f"{word}: no .tar shards in this folder; for single images take latent_mt.data.ImageData"
                )
            return found
        if place.is_file():
            return [str(place)]
    if "{" in word:
        from braceexpand import braceexpand  # which comes with webdataset

        try:
            found = list(braceexpand(word))
        except ValueError as error:
            raise UserError(f"data.params.path {word}: {error}") from None
        if found != [word]:
            return [shard if is_remote(shard) else str(Path(shard).expanduser()) for shard in found]
    if not is_remote(word) and any(sign in place.name for sign in "*?["):
        raise UserError(f"{word}: write numbered shards as {{00000..00099}}.tar, or name their folder")
    if not is_remote(word) and place.suffix.lower() != ".tar":
        beside = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{word}: no such folder, and no .tar{nearest(place.name, beside)}")
    return [word if is_remote(word) else str(place)]
