"""What every command shares: one-line errors with exit code 2, logging from the main process, the configuration printed first."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from ..errors import Interrupted, ProcessError, ToldElsewhere, UserError, in_a_line, needed_install
from ..generation.build import model_sections, sampling_may_change, saved_config
from ..generation.drawing import take_parents_sampler
from ..runs import precision
from ..runs.checkpoint import differing_keys, find_weights, read_config
from ..runs.config import Config, ModelConfig, parse
from ..runs.distributed import Processes
from ..runs.processes.launcher import rank_of_launcher
from ..runs.resume import newest_checkpoint


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main` as a program: UserError, or the system's refusal of a file, is one line on stderr and exit code 2, Ctrl-C 130.

    So is a package that is not installed. SIGUSR1, by which schedulers announce their end, ends nothing: a training run saves.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _take_signals()
    try:
        if (
            rank_of_launcher() != 0
        ):  # what is said of the data as a whole, one process says; a broken image, the one that met it
            for package in ("guided_mt", "latent_mt"):
                logging.getLogger(f"{package}.data").setLevel(logging.ERROR)
        main(sys.argv[1:] if argv is None else argv)
    except ToldElsewhere:
        _leave(2)
    except (UserError, OSError) as error:
        # What is wrong with the flags is wrong on every process: one line is enough until they know of each other.
        if _among_others() or rank_of_launcher() == 0 or isinstance(error, ProcessError):
            print(f"error: {in_a_line(error)}", file=sys.stderr, flush=True)
        _leave(2)
    except ModuleNotFoundError as error:
        missing = needed_install(error)
        if not missing:
            raise
        if rank_of_launcher() == 0:
            print(f"error: {missing}", file=sys.stderr, flush=True)
        _leave(2)
    except Exception as error:
        if memory := in_a_line(error):  # one process may have less of it than the others
            print(f"error: {memory}", file=sys.stderr, flush=True)
            _leave(2)
        if not _among_others():
            raise
        traceback.print_exc()
        _leave(1)
    except KeyboardInterrupt as error:
        if str(error) or not isinstance(error, Interrupted):
            print(str(error) or "interrupted", file=sys.stderr, flush=True)
        _leave(130)


def _take_signals() -> None:
    """Ctrl-C is Python's again, which the scripts leave to the system while they import; SIGUSR1 is ignored."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


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


def announce(config: Config, processes: Processes, *lines: str, run: Path | None = None) -> bool:
    """Print the resolved configuration on the main process; True where `--dry_run` says to stop here.

    Raises UserError where --out is a file that another flag reads. Before, the network's precision is settled for the device:
    run, a training run's folder, keeps that of its newest checkpoint.
    """
    keep_inputs(config, getattr(config, "out", ""))
    if "steps" in config.typed and hasattr(config, "diffusion_steps") and config.steps > config.diffusion_steps:
        lines = (*lines, f"{config.diffusion_steps} network calls and not {config.steps}: the schedule has no more")
    if any(isinstance(section, ModelConfig) for section in config.sections()):
        newest = newest_checkpoint(run) if run is not None else None
        saved = (read_config(newest / "model.safetensors") or {}) if newest is not None else {}
        lines = (*lines, *precision.settle(config, processes.device, str(saved.get("precision", ""))))
    if processes.is_main:
        print(config.to_yaml(), end="", flush=True)
        for line in lines:
            print(f"# {line}", flush=True)
    return config.dry_run


def keep_inputs(config: Config, out: str) -> None:
    """Raise UserError where `out`, or the picture beside an .npz, is a file that another flag reads: it would be lost."""
    places = [Path(out), Path(out).with_suffix(".png")] if out else []
    written = {os.path.realpath(path) for path in places if path.exists()}
    for flag, value in config.as_dict().items() if written else ():
        if flag != "out" and isinstance(value, str):
            for word in {value, *re.split("[,= ]", value)}:
                if word and os.path.realpath(Path(word).expanduser()) in written:
                    raise UserError(
                        f"--out {out}: would be written over {word}, which --{flag} reads; give another name"
                    )


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
