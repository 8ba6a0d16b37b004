"""Print the script that completes sub-commands, flags, their values, presets and files in a shell.

    source <(mt-diffusion completion bash)                                              # in ~/.bashrc
    source <(mt-diffusion completion zsh)                                               # in ~/.zshrc, after compinit
    mt-diffusion completion fish > ~/.config/fish/completions/mt-diffusion.fish

The scripts ask `mt-diffusion completion words` at each press of the key, which answers without importing what is completed.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluations.errors import run

from .commands import COMMANDS, kinds

FLAGS = Path(__file__).with_name("flags.json")  # written by reference.py
SCRIPTS = {
    "bash": """\
_mt_diffusion() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }" breaks="${COMP_WORDBREAKS//[^=:]/}" before=""
    COMPREPLY=($(mt-diffusion completion words -- "$line" 2>/dev/null))
    [[ $breaks ]] && before="${word%"${word##*[$breaks]}"}"  # bash replaces what follows such a character alone
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace
}
complete -o bashdefault -o default -F _mt_diffusion mt-diffusion
""",
    "zsh": """\
#compdef mt-diffusion
_mt_diffusion() {
    local -a found
    found=("${(@f)$(mt-diffusion completion words -- "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -z "${found[1]}" ]]; then
        _files
    elif [[ "${found[1]}" == *[=/] ]]; then
        compadd -S '' -- "${found[@]}"
    else
        compadd -- "${found[@]}"
    fi
}
compdef _mt_diffusion mt-diffusion
""",
    "fish": """\
function __mt_diffusion
    set -l found (mt-diffusion completion words -- (commandline -cp) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c mt-diffusion -f -a '(__mt_diffusion)'
""",
}


def main(argv: Sequence[str]) -> None:
    """Print the completion script of a shell, or the words that may come next, as `argv` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument("line", nargs="?", default="", metavar="LINE", help="of `words`: the line up to the cursor")
    arguments = parser.parse_args(argv)
    if arguments.shell != "words":
        print(SCRIPTS[arguments.shell], end="")
        return
    for candidate in candidates(arguments.line):
        print(candidate)


def candidates(line: str) -> list[str]:
    """What may stand in the place of the last word of `line`, the command line up to the cursor. [] leaves it to the shell, which
    knows files."""
    words = line.split(" ")
    before = [word for word in words[1:-1] if word]
    return [word for word in _following(before, words[-1]) if word.startswith(words[-1])]


def _following(before: Sequence[str], typed: str) -> Iterable[str]:
    if not before:
        return dict.fromkeys(name.partition(" ")[0] for name in COMMANDS)
    name, rest = before[0], before[1:]
    if kinds(name):
        if not rest:
            return kinds(name)
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        return []
    flags = flags_of(name)
    flag, equals, _ = typed.partition("=")
    if equals and flag in flags:
        return [f"{flag}={value}" for value in _values(name, flag, flags[flag], typed.partition("=")[2])]
    if rest and rest[-1] in flags and flags[rest[-1]]:
        return _values(name, rest[-1], flags[rest[-1]], typed)
    if typed.startswith("-"):
        return flags
    return _words(name, rest, typed)


def flags_of(name: str) -> dict[str, str]:
    """{flag: what it takes} of a sub-command, with those it passes on to another one."""
    flags: dict[str, dict[str, str]] = _read()["flags"]
    return {**flags.get(name, {}), **flags.get(COMMANDS[name].passes_to, {})}


def _read() -> dict[str, Any]:
    return json.loads(FLAGS.read_text(encoding="utf-8"))


def _values(name: str, flag: str, takes: str, typed: str) -> Iterable[str]:
    """What a flag may take; names of settings and files where it takes either."""
    for command in (name, COMMANDS[name].passes_to):
        if (command, flag) in SETTINGS:
            return [*SETTINGS[command, flag](), *_paths(typed)]
    return takes.split("|") if "|" in takes else []


def _words(name: str, rest: Sequence[str], typed: str) -> Iterable[str]:
    """What may stand without a flag."""
    if name == "completion":
        return SCRIPTS if not rest else []
    if name == "presets":
        return [setting for names in dict.fromkeys(SETTINGS.values()) for setting in names()]
    if name in ("latent-train", "autoencoder-train", "encode", "table4") and typed:
        return _read()["keys"]
    return []


def _paths(typed: str) -> list[str]:
    return [f"{path}/" if os.path.isdir(path) else path for path in sorted(glob.glob(f"{glob.escape(typed)}*"))]


def _pixel() -> list[str]:
    from guided_mt.runs import presets

    return presets.names()


def _latent() -> list[str]:
    from latent_mt import configs

    return configs.names()


def _table4() -> list[str]:
    from reproduce.table4_presets import PRESETS

    return list(PRESETS)


SETTINGS: dict[tuple[str, str], Callable[[], list[str]]] = {
    ("train", "--preset"): _pixel,
    ("latent-train", "--config"): _latent,
    ("autoencoder-train", "--config"): _latent,
    ("encode", "--config"): _latent,
    ("table4", "--preset"): _table4,
}


def console() -> None:
    """The sub-command's door."""
    run(main)
