"""Which sub-command was typed, and running it. Nothing large is imported before that is known."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from guided_mt.errors import nearest, needed_install
from latent_mt.runs.program import shown_as

from .commands import COMMANDS, kinds

PROGRAM = "mt-diffusion"


def main() -> NoReturn:
    """The console command: `sys.argv` holds the sub-command and its words. Bad input is one line and exit code 2."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        from .first_page import all_commands, first_steps

        print(all_commands() if words else first_steps())
        sys.exit(0)
    if words[0] == "--version":
        from importlib.metadata import version

        print(version(PROGRAM))
        sys.exit(0)
    name, rest = split(words)
    run(name, rest)
    sys.exit(0)


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """(the sub-command, its own words). Ends the program for one that doesn't exist."""
    first, *rest = words
    if first in COMMANDS:
        return first, rest
    several = kinds(first)
    if several and rest and rest[0] in several:
        return f"{first} {rest[0]}", rest[1:]
    if several and (not rest or rest[0] in ("-h", "--help")):
        lines = [f"  {PROGRAM} {first} {kind:16s}{COMMANDS[f'{first} {kind}'].summary}" for kind in several]
        print("\n".join([f"{PROGRAM} {first} is one of", *lines]), file=sys.stdout if rest else sys.stderr)
        sys.exit(0 if rest else 2)
    if several:
        fail(f"{first} {rest[0]}: unknown{nearest(rest[0], several)}; there are {', '.join(several)}")
    if first.startswith("-"):
        fail(f"the sub-command comes first, as in {PROGRAM} train {first} ...; {PROGRAM} --help lists all")
    fail(f"unknown sub-command '{first}'{suggestion(first)}; {PROGRAM} --help lists all")


def suggestion(word: str) -> str:
    """' (did you mean ...?)' for the nearest sub-command; the names of the scripts are known too."""
    known = {
        command.script.rpartition("/")[2].removesuffix(".py").replace("_", "-"): name
        for name, command in COMMANDS.items()
    }
    known |= {name: name for name in COMMANDS}
    match = difflib.get_close_matches(word.replace("_", "-").removesuffix(".py"), known, n=1, cutoff=0.5)
    return f" (did you mean {known[match[0]]}?)" if match else ""


def run(name: str, words: Sequence[str]) -> None:
    """Run a sub-command with these words in this process."""
    with shown_as(f"{PROGRAM} {name}", words):
        try:
            COMMANDS[name].load().console()
        except ModuleNotFoundError as error:
            missing = needed_install(error)
            if not missing:
                raise
            fail(missing)


def fail(message: str) -> NoReturn:
    """One line on stderr, and the end with exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
