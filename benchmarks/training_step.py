"""What a training step costs: single task, forms U and X, labels, in fp32 and bf16, by stage, against guided-diffusion's choices.

    python benchmarks/training_step.py [--image_size 32 --num_channels 64 --batch 16 --rounds 5 --device cuda]

Every round runs each row once, so that a busy machine slows all of them alike; printed are medians over rounds, and the
medians of the per-round ratios. Peak memory is measured in a process of its own per row.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from network import adm_style
from torch import nn

from guided_mt.generation.batches import load_beside
from guided_mt.generation.build import fit_to_data, open_images, run_sections
from guided_mt.runs.compiling import COMPILE
from guided_mt.runs.config import parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.optim import learning_rate
from guided_mt.training.train_loop import TrainLoop

STAGES = ("table / K", "forward", "backward", "optimiser", "EMA and log")


CLASSES_PER_IMAGE = 13  # of the ImageNet presets: 1000 classes, batch 75
FIVE = ("--mt_task", "masked,label,caption,random-caption", "--caption_template", "a photo of a {class}")
LABEL_E = ("--mt_task", "label", "--mt_variant", "U", "--mt_label_head", "E", "--classifier_width", "64")


@dataclass(frozen=True)
class Row:
    name: str
    flags: tuple[str, ...]
    adm: bool = False


ROWS = (
    Row("guided-diffusion's choices, fp32", ("--mt_task", "none"), adm=True),
    Row("single task, fp32", ("--mt_task", "none")),
    Row("form U, fp32", ("--mt_task", "masked", "--mt_variant", "U")),
    Row("form X, fp32", ("--mt_task", "masked", "--mt_variant", "X")),
    Row("label M, K = 1, fp32", ("--mt_task", "label", "--mt_variant", "U")),
    Row("label M, K = 100, fp32", ("--mt_task", "label", "--mt_variant", "U", "--mt_encoder_refresh", "100")),
    Row("label E, K = 100, fp32", (*LABEL_E, "--mt_encoder_refresh", "100")),
    Row("five tasks, form any, K = 100, fp32", (*FIVE, "--mt_variant", "any", "--mt_encoder_refresh", "100")),
    Row("five tasks, form X, fp32", (*FIVE, "--mt_variant", "X")),
    Row("single task, bf16", ("--mt_task", "none", "--precision", "bf16")),
    Row("form U, bf16", ("--mt_task", "masked", "--mt_variant", "U", "--precision", "bf16")),
    Row("form X, bf16", ("--mt_task", "masked", "--mt_variant", "X", "--precision", "bf16")),
)


class Step:
    """One row's training step, stage by stage."""

    def __init__(self, row: Row, args: argparse.Namespace, folder: Path):
        self.row, device = row, torch.device(args.device)
        images = folder / "images.npz"
        if not images.exists():
            shape = (2 * args.batch, args.image_size, args.image_size, 3)
            rng = np.random.default_rng(0)
            pixels, labels = rng.integers(0, 256, shape, dtype=np.uint8), np.arange(shape[0])
            np.savez(images, arr_0=pixels, arr_1=labels)
        flags = [
            "--data_dir",
            str(images),
            "--image_size",
            str(args.image_size),
            "--num_channels",
            str(args.num_channels),
        ]
        flags += ["--num_res_blocks", str(args.num_res_blocks), "--global_batch_size", str(args.batch)]
        flags += ["--num_head_channels", "64", "--resblock_updown", "True", "--use_new_attention_order", "True"]
        flags += ["--attention_resolutions", "32,16,8", "--learn_sigma", "True", "--noise_schedule", "cosine"]
        flags += ["--num_classes", str(CLASSES_PER_IMAGE * args.batch)]
        flags += ["--compile", args.compile] if not row.adm else []
        config = parse([*flags, *row.flags], run_sections(), description="")
        source = open_images(config)
        fit_to_data(config, source)
        self.loop = TrainLoop(config, Processes(device=device), source, folder)
        for p in self.loop.model.parameters():  # zero weights would let the convolutions multiply by zeros
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        if row.adm:
            self.loop.model.to(memory_format=torch.contiguous_format)
            self.adamw = torch.optim.AdamW(self.loop.model.parameters(), lr=1e-4, weight_decay=0.0)
        self.loop.model.train()
        for modality in self.loop.modalities.values():
            modality.prepare(source)
        with self.loop.stream() as stream:
            self.batch = next(iter(stream))
        self.batch.loaded.update(load_beside(self.loop.modalities, self.batch.indices.numpy()))
        self.batch = self.batch.to(device)

    def run(self) -> list[float]:
        """Seconds of each stage."""
        loop, encoding = self.loop, 0.0
        if loop.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        for modality in loop.modalities.values():  # a table of encodings: its share of one step
            start = self._now()
            modality.before_step(0, loop.processes)
            encoding += (self._now() - start) / loop.config.mt_encoder_refresh
        times = [self._now()]
        with adm_style() if self.row.adm else contextlib.nullcontext():
            loss, record = loop.losses(self.batch, slice(0, len(self.batch.images)))
            times.append(self._now())
            loss.backward()
            times.append(self._now())
        if self.row.adm:
            norm = (
                sum((p.grad**2).sum().item() for p in loop.model.parameters()) ** 0.5
            )  # its _compute_norms: a sync each
            self.adamw.step()
            self.adamw.zero_grad()
            times.append(self._now())
            for average in loop.ema.averages.values():
                for target, source in zip(average, loop.model.parameters(), strict=True):
                    target.detach().mul_(0.9999).add_(source.detach(), alpha=1 - 0.9999)
            norm = torch.tensor(norm)
        else:
            norm = loop.optimizer.step(learning_rate(0, 1e-4, 0, 0))
            times.append(self._now())
            loop.ema.update()
        loop.track(record, norm.to(loop.device))
        times.append(self._now())
        return [encoding, *(b - a for a, b in itertools.pairwise(times))]

    def _now(self) -> float:
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_memory(row: Row, args: argparse.Namespace) -> float:
    """GiB: of the GPU's allocator, or of the whole process on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        step = Step(row, args, Path(folder))
        for _ in range(2):
            step.run()
        if args.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_channels", type=int, default=64)
    parser.add_argument("--num_res_blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", nargs="?", const="True", default="False", choices=COMPILE)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        steps = [Step(row, args, Path(folder)) for row in ROWS]
        parameters = sum(p.numel() for p in steps[1].loop.model.parameters()) / 1e6
        print(
            f"{args.image_size} px, {parameters:.1f} M parameters, batch {args.batch}, {args.device}, torch {torch.__version__}"
        )
        for step in steps:
            step.run()  # warm-up
        taken = [[step.run() for step in steps] for _ in range(args.rounds)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = pool.starmap(peak_memory, [(row, args) for row in ROWS], chunksize=1)

    totals = [[sum(stages) for stages in round_] for round_ in taken]
    median = lambda values: statistics.median(values)  # noqa: E731
    print(
        f"{'':36s}"
        + "".join(f"{name:>13s}" for name in STAGES)
        + "     step   images/s   x ADM's   x single   peak GiB"
    )
    for i, row in enumerate(ROWS):
        stages = [1000 * median([round_[i][s] for round_ in taken]) for s in range(len(STAGES))]
        total = median([t[i] for t in totals])
        single = 1 if row.name.endswith("fp32") else [r.name for r in ROWS].index("single task, bf16")
        against_adm = median([t[0] / t[i] for t in totals])
        against_single = median([t[i] / t[single] for t in totals])
        cells = "".join(f"{ms:10.1f} ms" for ms in stages) + f"{1000 * total:7.0f} ms{args.batch / total:9.1f}"
        print(f"{row.name:36s}{cells}{against_adm:10.2f}{against_single:11.3f}{memory[i]:11.2f}")
    print("x ADM's: how many times as fast as guided-diffusion's choices. x single: time relative to the single task.")


if __name__ == "__main__":
    main()
