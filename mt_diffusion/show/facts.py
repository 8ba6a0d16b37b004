"""What is found out about something on disk, and how it is printed."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTH = 120


@dataclass
class Facts:
    """kind: what it is. rows: what is known of it, by name. commands: what to type next, each with the reason."""

    path: str
    kind: str
    rows: dict[str, Any] = field(default_factory=dict)
    commands: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """A row, where there is something to say."""
        if value not in (None, "", [], {}):
            self.rows[name] = value

    def command(self, why: str, *words: object) -> None:
        """`mt-diffusion WORDS` as something to type next."""
        self.commands.append((why, " ".join(["mt-diffusion", *(quoted(word) for word in words)])))

    def as_dict(self) -> dict[str, Any]:
        commands = [{"why": why, "command": command} for why, command in self.commands]
        return {"path": self.path, "kind": self.kind, **self.rows, "commands": commands}

    def text(self) -> str:
        """Aligned, for a terminal."""
        lines = [f"{self.path}: {self.kind}"]
        indent = max(map(len, self.rows), default=0) + 4
        for name, value in self.rows.items():
            wrapped = textwrap.wrap(_plain(value), WIDTH - indent, break_long_words=False, break_on_hyphens=False)
            lines.append(f"  {name:{indent - 2}s}{wrapped[0] if wrapped else ''}")
            lines += [" " * indent + line for line in wrapped[1:]]
        if self.commands:
            lines.append("What to type next:")
            widest = max(len(why) for why, _ in self.commands) + 2
            lines += [f"  {why:{widest}s}{command}" for why, command in self.commands]
        return "\n".join(lines)


def quoted(word: object) -> str:
    """A word for a shell; what stands in capitals is for the user to fill in."""
    return shlex.quote(str(word))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def size_of(path: Path) -> str:
    """The bytes of a file, or of all files in a folder."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else [path]
    size = float(sum(file.stat().st_size for file in files if file.is_file()))
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def shortened(names: list[str], most: int = 10) -> str:
    """The first names of a list."""
    return ", ".join(names[:most]) + (f", ... ({len(names):,} in all)" if len(names) > most else "")
