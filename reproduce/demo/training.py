"""The training of the demo as a process of its own, followed on the terminal, and its curve."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
from pathlib import Path

from tqdm.auto import tqdm

from evaluations.tables.figures import new_figure, save_figure
from guided_mt.errors import UserError, how_to_install

from ..children import run_child
from ..commands import command, environment, launcher, shown

LOG = "demo_log.txt"
LOOK = 0.5  # seconds between looks at progress.csv
TAIL = 15  # lines of the log that are shown when training fails


def train(preset: str, run: Path, steps: int, processes: int, *more: str) -> None:
    """Train the preset for so many steps, its learning rate falling to 0 at the last; what it prints goes to `LOG` of the run.

    Raises UserError where it fails. On Ctrl-C it waits until the training has saved and ended; a second one kills it.
    """
    words = command("train", *options(preset, run, steps), *more, processes=processes)
    if processes > 1 and launcher() is None:
        print(f"no mpiexec found: training in one process; {how_to_install('mpi4py')} brings one")
    log = run / LOG
    print("$", shown(words), flush=True)
    run.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()
    followed = threading.Thread(target=follow, args=(ended, run / "progress.csv", steps))
    followed.start()
    try:
        with open(log, "a") as file:
            code = run_child(words, stdout=file, stderr=subprocess.STDOUT, env=environment())
    finally:
        ended.set()
        followed.join()
    if code:
        print(*log.read_text().splitlines()[-TAIL:], sep="\n", file=sys.stderr)
        raise UserError(f"training ended with exit code {code}; {log} holds all that it said")


def options(preset: str, run: Path, steps: int) -> list[str]:
    """Of the training command."""
    number = str(steps)
    return ["--preset", preset, "--log_dir", str(run), "--total_steps", number, "--lr_anneal_steps", number]


def follow(ended: threading.Event, progress: Path, steps: int) -> None:
    """Show steps, loss and the time that is left until the training has ended."""
    live = sys.stderr.isatty()
    begun, _ = reached(progress)
    first, over = True, False
    with tqdm(total=steps, initial=begun, desc="training", unit="step", mininterval=LOOK if live else 10) as bar:
        while not over:
            over = ended.wait(LOOK)  # one look more when it has ended
            step, loss = reached(progress)
            if step <= bar.n:
                bar.refresh() if live else None  # the clock runs while torch is loaded
                continue
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if first:  # its steps waited for torch to load, so they tell nothing about the rest
                first, bar.initial, bar.n, bar.last_print_n = False, step, step, step
                bar.unpause()
                bar.refresh()
            else:
                bar.update(step - bar.n)


def reached(progress: Path) -> tuple[int, float]:
    """(step, loss) of the last row; (0, nan) where there is none."""
    rows = read_rows(progress)
    return (int(rows[-1]["step"]), float(rows[-1]["loss"])) if rows else (0, float("nan"))


def read_rows(progress: Path) -> list[dict[str, str]]:
    """The whole rows of progress.csv; none where it is missing."""
    if not progress.exists():
        return []
    with open(progress, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def draw_curve(progress: Path, out: Path) -> None:
    """The losses of progress.csv against the step."""
    rows = read_rows(progress)
    steps = [int(row["step"]) for row in rows]
    names = {"mse": "denoising (mse)", "masked": "masked image (mse)", "label": "label (cross-entropy)"}
    figure, axes = new_figure(6, 3.5)
    for name, label in names.items():
        if not rows or name not in rows[0]:
            continue
        axes.plot(steps, [float(row[name]) for row in rows], label=label)
    axes.set(xlabel="training step", ylabel="loss", yscale="log")
    axes.legend()
    save_figure(figure, out)
