"""What every command shares: one-line errors with exit code 2, logging from the main process, the configuration printed first."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import torch.distributed as dist

from ..errors import UserError
from ..generation.build import model_sections, sampling_may_change, saved_config
from ..generation.drawing import take_parents_sampler
from ..runs.checkpoint import differing_keys, find_weights
from ..runs.config import Config, parse
from ..runs.distributed import Processes, rank_of_launcher


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main` as a program: UserError, or the system's refusal of a file, is one line on stderr and exit code 2, Ctrl-C 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError) as error:
        # What is wrong with the flags is wrong on every process: one line is enough until they know of each other.
        if _among_others() or rank_of_launcher() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except Exception:
        if not _among_others():
            raise
        traceback.print_exc()
        _leave(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _leave(130)


def _among_others() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave(code: int) -> None:
    if _among_others():
        # The others may wait in a collective that this process never joins: leave at once, so that the launcher ends them.
        os._exit(code)
    sys.exit(code)


def rename_flag(argv: Sequence[str], other: str, flag: str) -> list[str]:
    """`argv` with `--other VALUE` and `--other=VALUE` written as `--flag`."""
    words = [flag if word == other else word for word in argv]
    return [flag + word.removeprefix(other) if word.startswith(f"{other}=") else word for word in words]


def split_flags(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words of the flags in `names` with their values, the others)."""
    chosen, rest, words = [], [], iter(argv)
    for word in words:
        if word.partition("=")[0].removeprefix("--") not in names or not word.startswith("--"):
            rest.append(word)
        elif "=" in word:
            chosen.append(word)
        else:
            chosen += [word, *([value] if (value := next(words, None)) is not None else [])]
    return chosen, rest


def announce(config: Config, processes: Processes, *lines: str) -> bool:
    """Print the resolved configuration on the main process; True where `--dry_run` says to stop here."""
    if processes.is_main:
        print(config.to_yaml(), end="", flush=True)
        for line in lines:
            print(f"# {line}", flush=True)
    return config.dry_run


def with_saved_config(argv: Sequence[str], sections: Sequence[type], description: str) -> Config:
    """Parse `sections` and the model's own over the configuration saved beside `--model_path`.

    A flag that contradicts the saved network is an error (UserError).

    A foreign file (ADM's .pt) has none, so its flags have to be given, as in ADM.
    """
    own = {field.name for section in sections for field in dataclasses.fields(section)}
    sections = (*sections, *model_sections())
    first = parse(argv, sections, description=description)
    weights = find_weights(first.model_path, first.ema)
    saved = saved_config(weights)
    # What a run was trained with is no default for where and how to sample.
    base = {key: value for key, value in saved.items() if key not in own and key != "timestep_respacing"}
    config = parse(argv, sections, description=description, base=base)
    fixed = config.typed - sampling_may_change()
    model = {key: value for key, value in config.as_dict(*model_sections()).items() if key in fixed}
    different = differing_keys(base, model)
    if different:
        raise UserError(
            f"{first.model_path}: was trained with other settings: {', '.join(different)}; leave these flags out"
        )
    if hasattr(config, "sampler"):
        take_parents_sampler(config)
    for section in config.sections():
        if hasattr(section, "model_path"):
            section.model_path = str(weights)  # looked up once: beside a running training the newest weights change
    return config
