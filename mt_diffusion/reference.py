"""Writes docs/commands.md, the reference of all sub-commands, and flags.json, which shell completion reads:

    python -m mt_diffusion.reference

Both are made of the parsers, so that they are true; a test says when they have to be made anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from guided_mt.modalities.registry import TASKS
from latent_mt.data import ImageData, PairData, ShardData
from latent_mt.model.tasks import TaskKeys
from latent_mt.runs.run_config import RunConfig

from .commands import COMMANDS, GROUPS
from .completion import FLAGS
from .flags import Flag, Usage, plain, usage_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
ARGPARSE = ("options", "positional arguments")  # sections without a title of their own
START = """\
# All commands and their flags

<!-- Written by `python -m mt_diffusion.reference` from the parsers. Change the help texts there, not this page. -->

`mt-diffusion SUB-COMMAND [flags]` is the one command of an installed package. `python -m mt_diffusion SUB-COMMAND` is the same, and
in a clone so is the file that stands beside each sub-command below. `mpiexec -n 8`, `torchrun --no-python --nproc-per-node 8` and
`srun` in front of it start it on several processes.

Flags are written `--name value` or `--name=value`; a switch takes no value. `mt-diffusion SUB-COMMAND --help` prints what stands
here, `mt-diffusion presets` lists the named settings, and `mt-diffusion completion bash` prints the completion script of a shell.
"""
SHARED = """\
## Flags that several commands share

What describes the model has to be given when it is trained. Commands that read a trained model find it beside the weights, and take
these flags for weights without a configuration, such as guided-diffusion's `.pt` files.
"""
YAML = """\
## Keys of a latent configuration

`latent-train`, `autoencoder-train` and `encode` read a YAML file of latent-diffusion's shape: `model`, `data`, `lightning`, and a
`run` section of ours. Words `key.of.the.file=value` on the command line change it. Below are the keys that latent-diffusion doesn't
have.
"""
TASKS_TEXT = """\
### model.params.mt_tasks

A key is the modality's name. Its value may have `task` (a row of the registry; the name unless given), `weights`, `loss_weight`,
`swap_prob` and `absent` of this modality alone, and the options of its row:
"""


def page(usages: dict[str, Usage]) -> str:
    """docs/commands.md."""
    shared = shared_sections(usages)
    parts = [START, *contents()]
    for name, usage in usages.items():
        parts += command(name, usage, shared)
    parts += [SHARED, *(section(title, flags) for title, flags in shared.items())]
    return "\n".join([*parts, YAML, *yaml_keys()])


def contents() -> Iterable[str]:
    """A table of sub-commands for each group, Markdown."""
    for group in GROUPS:
        rows = [(f"[`{name}`](#{anchor(name)})", row.summary) for name, row in COMMANDS.items() if row.group == group]
        yield f"| {group} | |\n| --- | --- |\n" + "".join(f"| {a} | {b} |\n" for a, b in rows)


def anchor(name: str) -> str:
    """The anchor of a sub-command's heading."""
    return "mt-diffusion-" + name.replace(" ", "-")


def shared_sections(usages: dict[str, Usage]) -> dict[str, list[Flag]]:
    """The sections that several commands have alike, by title; of one title the contents that most of them have."""
    sections = [section for usage in usages.values() for section in usage.sections.items()]
    found = Counter((title, tuple(flags)) for title, flags in sections if title not in ARGPARSE)
    often = [(title, list(flags)) for (title, flags), count in reversed(found.most_common()) if count > 1]
    order = list(dict.fromkeys(title for usage in usages.values() for title in usage.sections))
    return dict(sorted(dict(often).items(), key=lambda section: order.index(section[0])))


def heading(title: str) -> tuple[str, str]:
    """(what a section is called, what its title says besides): "Data (all of it). More." -> ("Data", "All of it. More.")."""
    match = re.fullmatch(r"([^(.]+?)(?: \((.*?)\))?(?:\. (.*))?", title)
    name, inside, after = match.groups() if match else (title, None, None)
    sentences = [f"{part[0].upper()}{part[1:]}." for part in (inside, after) if part]
    return name, " ".join(sentences)


def section(title: str, flags: Sequence[Flag]) -> str:
    """A section of flags under its heading, Markdown."""
    name, more = heading(title)
    return f"### {name}\n\n{escaped(more)}\n\n{table(flags)}" if more else f"### {name}\n\n{table(flags)}"


def command(name: str, usage: Usage, shared: dict[str, list[Flag]]) -> Iterable[str]:
    """The parts of a sub-command's chapter, Markdown. shared: sections that several of them have, which stand by themselves."""
    row = COMMANDS[name]
    yield f"## mt-diffusion {name}\n"
    yield described(usage.description)
    words = [flag.names[0] for flag in usage.flags() if not flag.names[0].startswith("-")]
    also = [f"`python {row.script}`"] if row.script else []
    needs = [f"needs `pip install 'mt-diffusion[{row.extra}]'`"] if row.extra else []
    yield f"Usage: `mt-diffusion {' '.join([name, *words, '[flags]'])}`{''.join(f'; {part}' for part in also + needs)}.\n"
    own = {title: flags for title, flags in usage.sections.items() if shared.get(title) != flags}
    for title, flags in own.items():
        yield (
            table(flags)
            if len(own) == 1 or title in ("options", "positional arguments")
            else f"{title}:\n\n{table(flags)}"
        )
    others = [heading(title)[0] for title in usage.sections if title not in own]
    if others:
        yield f"{'And the' if own else 'The'} flags of {', '.join(f'[{name}](#{_slug(name)})' for name in others)}.\n"


def described(text: str) -> str:
    """A description with its indented lines as code."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        indented = all(line.startswith("    ") for line in block.splitlines())
        language = "sh" if block.strip().startswith(("mt-diffusion", "mpiexec")) else "text"
        dedented = inspect.cleandoc(block)
        blocks.append(f"```{language}\n{dedented}\n```\n" if indented else f"{escaped(block)}\n")
    return "\n".join(blocks)


def table(flags: Sequence[Flag]) -> str:
    """Flags with their defaults, values and help, a Markdown table."""
    rows = ["| flag | default | values | |", "| --- | --- | --- | --- |"]
    for flag in flags:
        name = " or ".join(f"`{word}`" for word in flag.names)
        switch = flag.names[0].startswith("-") and not flag.takes
        default = f"`{flag.default}`" if flag.default else ("off" if switch else "")
        rows.append(f"| {name} | {default} | {'switch' if switch else escaped(flag.values)} | {escaped(flag.help)} |")
    return "\n".join(rows) + "\n"


def escaped(text: str) -> str:
    """Text in which Markdown sees no marks of its own."""
    return re.sub(r"(?<!`)([|*<])(?!`)", r"\\\1", text)


def _slug(title: str) -> str:
    """The anchor that Markdown gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# ---------------------------------------------------------------- YAML


def yaml_keys() -> Iterable[str]:
    """The parts of the chapter on keys of YAML files, Markdown."""
    yield f"### run\n\n{options_table(RunConfig, 'run.')}"
    yield "### model.params of LatentMTDiffusion\n\nBeside latent-diffusion's own keywords, which are accepted as they are.\n"
    yield options_table(TaskKeys, "model.params.")
    yield TASKS_TEXT
    for options, rows in _rows_by_options().items():
        yield f"`task: {' or '.join(rows)}`\n\n{options_table(options, '')}"
    for kind in (PairData, ImageData, ShardData):
        yield f"### data.params of {kind.__name__}\n\n{described(inspect.cleandoc(kind.__doc__ or ''))}\n{keywords_table(kind)}"


def _rows_by_options() -> dict[type, list[str]]:
    found: dict[type, list[str]] = {}
    for name, task in TASKS.items():
        found.setdefault(task.options, []).append(name)
    return found


def options_table(section: type, prefix: str) -> str:
    """The fields of a dataclass of options as keys."""
    flags = []
    for field in dataclasses.fields(section):
        data = field.metadata
        choices, names = (tuple(data[key] or ()) for key in ("choices", "names"))
        flags.append(
            Flag(
                (prefix + field.name,),
                "",
                plain(field.default),
                data["help"],
                choices,
                names,
                data["least"],
                data["most"],
            )
        )
    return table(flags).replace("| flag |", "| key |", 1)


def keywords_table(kind: Any) -> str:
    """The keywords of a class that a YAML file names."""
    parameters = inspect.signature(kind).parameters.values()
    rows = [
        f"| `data.params.{p.name}` | {'' if p.default is p.empty else f'`{plain(p.default)}`'} |" for p in parameters
    ]
    return "\n".join(["| key | default |", "| --- | --- |", *rows]).replace("``", "") + "\n"


# ---------------------------------------------------------------- completion


def flags_json(usages: dict[str, Usage]) -> str:
    """{command: {flag: what it takes}}, one line each: its values between |, or N, X, TEXT, '' for a switch."""
    found = {
        name: {
            word: "|".join(flag.choices or flag.names_of) or flag.takes
            for flag in usage.flags()
            for word in flag.names
            if word.startswith("--")
        }
        for name, usage in usages.items()
    }
    keys = [f"run.{field.name}=" for field in dataclasses.fields(RunConfig)]
    keys += [f"model.params.{field.name}=" for field in dataclasses.fields(TaskKeys)]
    keys += sorted(
        {
            f"data.params.{name}="
            for kind in (PairData, ImageData, ShardData)
            for name in inspect.signature(kind).parameters
        }
    )
    return json.dumps({"flags": found, "keys": keys}, indent=1) + "\n"


def written() -> dict[Path, str]:
    """{file: what it should hold}."""
    usages = {name: usage_of(name) for name in COMMANDS}
    return {PAGE: page(usages), FLAGS: flags_json(usages)}


def main() -> None:
    """Write the files."""
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
