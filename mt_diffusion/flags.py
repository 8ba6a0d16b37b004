"""What a sub-command can be told: its parser is asked, so that no list of flags is kept by hand."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_mt.runs.config import OptionParser
from latent_mt.runs.program import shown_as

from .commands import COMMANDS

BOOLEAN = ("True", "False")


@dataclass(frozen=True)
class Flag:
    """A flag, or a word that stands by its place. takes: what is written behind it, '' for a switch. default: '' where there is
    none, or where the help says it. choices: all valid values; names: what a value may be made of. least, most: its range."""

    names: tuple[str, ...]
    takes: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    names_of: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None

    @property
    def values(self) -> str:
        """Its range or choices in a few words."""
        if self.choices or self.names_of:
            return ", ".join(self.choices or self.names_of)
        also = " or -1" if self.default == "-1" else ""
        if self.least is not None and self.most is not None:
            return f"{_number(self.least)} to {_number(self.most)}{also}"
        return f"at least {_number(self.least)}{also}" if self.least is not None else ""


@dataclass(frozen=True)
class Usage:
    """A sub-command's description and its flags by section."""

    description: str
    usage: str
    sections: dict[str, list[Flag]] = field(default_factory=dict)

    def flags(self) -> Iterator[Flag]:
        for section in self.sections.values():
            yield from section


def usage_of(name: str) -> Usage:
    """Imports the sub-command, and asks its parser."""
    parser = parser_of(name)
    sections: dict[str, list[Flag]] = {}
    for group in parser._action_groups:
        flags = [_flag(action, parser) for action in group._group_actions if action.dest != "help"]
        if flags:
            sections.setdefault(group.title or "", []).extend(flags)
    return Usage(parser.description or "", parser.format_usage(), sections)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that answers `mt-diffusion NAME --help`."""
    asked: list[argparse.ArgumentParser] = []
    with suppress(SystemExit), _answering(asked), shown_as(f"mt-diffusion {name}", ["--help"]):
        COMMANDS[name].load().main(["--help"])
    return asked[0]


@contextmanager
def _answering(asked: list[argparse.ArgumentParser]) -> Iterator[None]:
    """Inside, a parser that is to print its help is put into `asked` instead."""
    printed = argparse.ArgumentParser.print_help

    def note(self: argparse.ArgumentParser, file: Any = None) -> None:
        asked.append(self)

    argparse.ArgumentParser.print_help = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.print_help = printed  # type: ignore[method-assign]


_NUMBERS: dict[Any, str] = {int: "N", float: "X", Path: "FILE"}


def _flag(action: argparse.Action, parser: argparse.ArgumentParser) -> Flag:
    fields = parser.fields if isinstance(parser, OptionParser) else {}
    names = tuple(action.option_strings) or (str(action.metavar or action.dest),)
    help_text = (action.help or "").replace("%%", "%")
    if action.dest in fields:
        metadata = fields[action.dest].metadata
        boolean = action.metavar == "BOOL"
        return Flag(
            names,
            str(action.metavar),
            plain(action.default),
            metadata["help"],
            BOOLEAN if boolean else _names(metadata["choices"]),
            _names(metadata["names"]),
            metadata["least"],
            metadata["most"],
        )
    switch = action.nargs == 0
    takes = "" if switch or not action.option_strings else str(action.metavar or _NUMBERS.get(action.type, "TEXT"))
    default = "" if switch or "default" in help_text else plain(action.default)
    if action.required and action.option_strings:
        default = "(required)"
    return Flag(names, takes, default, help_text, _names(action.choices))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _names(values: Iterable[Any] | None) -> tuple[str, ...]:
    return tuple(map(str, values or ()))


def plain(default: Any) -> str:
    """A default as it would be typed; '' for none."""
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    return "" if default is None or default is argparse.SUPPRESS else str(default)
