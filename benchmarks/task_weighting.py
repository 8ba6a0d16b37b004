"""What weights over time and tasks, and routing, add to a training step: image, masked image and label in form U, against `fixed`.

    python benchmarks/task_weighting.py [--sizes tiny,cifar --rounds 9]

Every round runs each row once, so that a busy machine slows all of them alike, and counts processor time on one thread. Printed are
medians of the per-round ratios with their quartiles. Rows that measure gradients do so in every step here; beside that stands what
follows for every 25th, the default. They need the extra `tasks`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from guided_mt.data import Batch, open_source
from guided_mt.generation.build import run_sections
from guided_mt.modalities.weighting.settings import WeightingConfig
from guided_mt.runs.config import parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.train_loop import TrainLoop

SIZES = {
    "tiny": "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 "
    "--global_batch_size 16",
    "cifar": "--image_size 32 --num_channels 64 --num_res_blocks 2 --channel_mult 1,2,2,2 --attention_resolutions 16,8 "
    "--num_head_channels 64 --global_batch_size 8",
}
COMMON = "--mt_task masked,label --mt_variant U --num_classes 10 --learn_sigma True --noise_schedule cosine"
ROWS = {
    "fixed": "",
    "fixed, once more": "",
    "fixed factors over time": "--timestep_weights min-snr --mt_timestep_weights min-snr",
    "learned over time": "--timestep_weights learned --mt_timestep_weights learned",
    "uncertainty": "--mt_task_weighting uncertainty --schedule_sampler stratified",
    "pcgrad": "--mt_task_weighting pcgrad --mt_task_weighting_interval 1",
    "nash": "--mt_task_weighting nash --mt_task_weighting_interval 1",
    "dtr": "--mt_routing dtr",
}
MEASURED = ("pcgrad", "nash")


class Run:
    """One row's training run, step by step."""

    def __init__(self, flags: str, folder: Path):
        config = parse([*COMMON.split(), *flags.split()], run_sections(), description="")
        images, size, count = folder / f"{config.image_size}.npz", config.image_size, config.global_batch_size
        if not images.exists():
            pixels = np.random.default_rng(0).integers(0, 256, (2 * count, size, size, 3), dtype=np.uint8)
            np.savez(images, arr_0=pixels, arr_1=np.arange(2 * count) % 10)
        self.loop = TrainLoop(config, Processes(device=torch.device("cpu")), open_source(str(images)), folder)
        for p in self.loop.model.parameters():  # zero weights would let the convolutions multiply by zeros
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        self.loop.model.train()
        pixels, numbers = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8), torch.arange(count)
        self.batch = Batch(pixels, numbers % 10, numbers, numbers)

    def step(self) -> float:
        """Processor seconds of one step."""
        start = time.process_time()
        self.loop.run_step(self.batch)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: flags for name, flags in ROWS.items() if name not in MEASURED or find_spec("torchjd")}
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            runs = {name: Run(f"{SIZES[size]} {flags}", Path(folder)) for name, flags in rows.items()}
            for run in runs.values():
                run.step()
            rounds = [{name: run.step() for name, run in runs.items()} for _ in range(args.rounds)]
        parameters = sum(p.numel() for p in runs["fixed"].loop.model.parameters()) / 1e6
        millis = 1000 * statistics.median(times["fixed"] for times in rounds)
        print(f"{size}: {parameters:.2f} M parameters, a step of `fixed` {millis:.0f} ms")
        every = WeightingConfig.mt_task_weighting_interval
        for name in rows:
            low, median, high = statistics.quantiles((times[name] / times["fixed"] for times in rounds), n=4)
            amortised = f"; every {every} steps {1 + (median - 1) / every:.3f}" if name in MEASURED else ""
            print(f"  {name:24s} {median:.3f} ({low:.3f} to {high:.3f}){amortised}", flush=True)


if __name__ == "__main__":
    main()
