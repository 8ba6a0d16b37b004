"""The main job on real images without a download: train on scikit-learn's digits, restore held-out ones, generate new ones.

    python scripts/demo.py [--run runs/demo] [--steps 1400] [--processes 2]

Calls the same scripts that any training does. Interrupted or run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
HELD_OUT = "builtin:digits-test"
IMAGES = 120


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--steps", type=int, default=1400, help="training steps; more than before trains on")
    parser.add_argument("--processes", type=int, default=2, help="MPI processes for training")
    arguments = parser.parse_args(argv)
    run, started = arguments.run, time.monotonic()

    train = ["--preset", "masked-digits", "--log_dir", run, "--total_steps", arguments.steps]
    if not (run / "checkpoints" / f"step_{arguments.steps:08d}").is_dir():
        call("image_train.py", *train, processes=arguments.processes)
    weights = run / "checkpoints" / f"step_{arguments.steps:08d}"
    restored = run / "samples" / f"restored_{arguments.steps}.npz"
    drawn = run / "samples" / f"samples_{arguments.steps}.npz"
    if not restored.exists():
        options = ["--mask", "patches:10", "--num_samples", IMAGES, "--batch_size", 60, "--out", restored]
        call("image_restore.py", "--model_path", weights, "--data_dir", HELD_OUT, *options)
    if not drawn.exists():
        call("image_sample.py", "--model_path", weights, "--num_samples", 64, "--batch_size", 64, "--out", drawn)
    curve = run / "training_curve.png"
    draw_curve(run / "progress.csv", curve)
    summary(restored)
    pictures = [restored.with_suffix(".png"), drawn.with_suffix(".png"), curve]
    print("pictures:", *pictures, sep="\n  ")
    print(f"done in {time.monotonic() - started:.0f} s")


def call(script: str, *options: object, processes: int = 1) -> None:
    """Run one of the scripts, under mpiexec where there are several processes and an mpiexec."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, options)]
    environment = dict(os.environ)
    launcher = Path(sys.executable).with_name("mpiexec")
    found = str(launcher) if launcher.exists() else shutil.which("mpiexec")
    if processes > 1 and found:
        command = [found, "-n", str(processes), "--oversubscribe", "--bind-to", "none", *command]
        if os.geteuid() == 0:  # Open MPI asks root to say so
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    elif processes > 1:
        print("no mpiexec found: training in one process (pip install '.[mpi]' brings one)")
    print("$", *command, flush=True)
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(code)


def draw_curve(progress: Path, out: Path) -> None:
    """The losses of progress.csv against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with open(progress, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("mse", "denoising (mse)"), ("masked", "masked image (mse of its head)")):
        axes.plot(steps, [float(row[name]) for row in rows], label=label)
    axes.set(xlabel="training step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def summary(restored: Path) -> None:
    """Mean squared error in the masked region, on the scale [-1, 1], against two baselines."""
    from guided_mt.data import load_images, open_source

    with np.load(restored, allow_pickle=False) as file:
        original, masked, ours = (
            file[name].astype(np.float64) / 127.5 - 1 for name in ("original", "masked", "restored")
        )
        hidden = np.broadcast_to(file["mask"][..., None] > 127, original.shape)
    images = load_images(open_source("builtin:digits"), original.shape[1]).images.numpy()
    mean = images.mean(axis=0).transpose(1, 2, 0) / 127.5 - 1
    filled = np.where(hidden, mean, masked)
    error = lambda x: ((x - original) ** 2)[hidden].mean()  # noqa: E731
    print(f"\n{len(original)} held-out digits, ten patches masked ({hidden.mean():.0%} of the pixels).")
    print("Mean squared error in the masked region (pixels in [-1, 1]):")
    for name, value in (("MT-Diffusion-X", ours), ("mean training image", filled), ("left masked (grey)", masked)):
        print(f"  {name:22s} {error(value):.3f}")
    outside = np.abs(ours - original)[~hidden].mean()
    print(f"Mean absolute error in the unmasked region, which the model keeps by itself: {outside:.3f}\n")


def console() -> None:
    main(sys.argv[1:])
