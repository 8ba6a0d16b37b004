"""What a training step of latent_mt costs with modalities beside the image, against the same U-Net without any.

    python benchmarks/latent_step.py [--latent_size 32 --model_channels 64 --batch 8 --rounds 9 --device cuda --cpu_time]

Latents are read as from a cache (scripts/encode_latents.py): encoding pixels at every step costs a pair twice an image, whatever
is trained on it. Every round runs each row once, so that a busy machine slows all of them alike; printed are medians over rounds,
and medians and quartiles of the per-round ratios. Peak memory is measured in a process of its own per row: of the GPU's
allocator, or of the process beyond what it had before the model was built.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from guided_mt.data import Batch
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.training.latent_diffusion import LatentTraining

STAGES = ("forward", "backward", "optimiser", "EMA")
SIDES = ["photo", "map"]


@dataclass(frozen=True)
class Row:
    name: str
    params: dict[str, Any]
    precision: str = "32-true"

    @property
    def single(self) -> str:
        """The row to compare with."""
        return f"single task, {self.name.rpartition(', ')[2]}"


def rows() -> list[Row]:
    kinds = {
        "single task": {},
        "form any, both roles": {"mt_sides": SIDES, "mt_variant": "any", "mt_swap_prob": 0.5},
        "form any": {"mt_sides": SIDES, "mt_variant": "any"},
        "form U, both roles": {"mt_sides": SIDES, "mt_variant": "U", "mt_swap_prob": 0.5},
        "form X": {"mt_sides": SIDES, "mt_variant": "X"},
        "two sides, form any": {"mt_sides": [*SIDES, "edges"], "mt_variant": "any", "mt_swap_prob": 0.6},
        "two sides and a label, form any": {
            "mt_sides": [*SIDES, "edges"],
            "mt_variant": "any",
            "mt_swap_prob": 0.6,
            "mt_tasks": {"label": {"num_classes": 10, "mt_encoder_refresh": 100}},
        },
    }
    precisions = {"fp32": "32-true", "bf16": "bf16-mixed"}
    return [Row(f"{kind}, {p}", params, precisions[p]) for p in precisions for kind, params in kinds.items()]


class Step:
    """One row's training step, stage by stage, as Lightning runs it."""

    def __init__(self, row: Row, args: argparse.Namespace):
        size, channels, sides = args.latent_size, args.channels, len(row.params.get("mt_sides", [0]))
        self.device = torch.device(args.device)
        self.autocast = row.precision == "bf16-mixed"
        self.clock = time.process_time if args.cpu_time else time.perf_counter
        unet = {
            "image_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "model_channels": args.model_channels,
            "num_res_blocks": args.num_res_blocks,
            "attention_resolutions": [4, 2],
            "channel_mult": [1, 2, 4],
            "num_head_channels": 32,
        }
        torch.manual_seed(0)
        model = LatentMTDiffusion(
            first_stage_config={
                "target": "ldm.models.autoencoder.IdentityFirstStage",
                "params": {"in_channels": channels},
            },
            unet_config={"target": "latent_mt.model.unet.UNetModel", "params": unet},
            linear_start=0.0015,
            linear_end=0.0195,
            image_size=size,
            channels=channels,
            **row.params,
        ).to(self.device)
        for p in model.network.parameters():  # zero weights would let the convolutions multiply by zeros
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        self.module = LatentTraining(model)
        self.trainer = SimpleNamespace(precision=row.precision, accumulate_grad_batches=1, precision_plugin=None)
        self.module.trainer = self.trainer
        numbers = torch.arange(args.batch)
        source = SimpleNamespace(
            path="", side_names=tuple(row.params.get("mt_sides", ())), present={}, labels=(numbers % 10).numpy()
        )
        self.module.prepare(SimpleNamespace(random_flip=True, source=source, val_source=None), resumed=False)
        self.optimizer = self.module.configure_optimizers()
        self.module.train()
        # Sides x mirrorings x (mean, log variance) x C
        cached = torch.randn(args.batch, sides * 2 * 2 * channels, size, size, device=self.device)
        labels = (numbers % 10).to(self.device)
        self.batch = Batch(cached, labels, numbers.to(self.device), numbers)

    def run(self) -> list[float]:
        """Seconds of each stage."""
        times = [self._now()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.module.training_step(self.batch, 0)
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        self.module.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(self._now())
        self.module.after_step()
        times.append(self._now())
        return [b - a for a, b in itertools.pairwise(times)]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def resident(field: str) -> float:
    """GiB of this process: "VmRSS" now, "VmHWM" at most so far."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**20


def peak_memory(row: Row, args: argparse.Namespace) -> float:
    """GiB; for a process of its own."""
    torch.set_num_threads(args.threads)
    before = resident("VmRSS")
    step = Step(row, args)
    for _ in range(3):
        step.run()
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent_size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--model_channels", type=int, default=64)
    parser.add_argument("--num_res_blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", default="", help="only the rows whose name holds this, as fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds of this process, which other programs disturb less"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    chosen = [row for row in rows() if args.rows in row.name]
    steps = {row.name: Step(row, args) for row in chosen}
    parameters = sum(p.numel() for p in next(iter(steps.values())).module.model.network.parameters()) / 1e6
    print(
        f"latents {args.channels} x {args.latent_size} x {args.latent_size}, {parameters:.1f} M parameters, batch {args.batch}, "
        f"{args.device}, torch {torch.__version__}"
    )
    for step in steps.values():
        step.run()  # warm-up
    taken = [{name: step.run() for name, step in steps.items()} for _ in range(args.rounds)]
    del steps
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.starmap(peak_memory, [(row, args) for row in chosen], chunksize=1)
    memory = {row.name: peak for row, peak in zip(chosen, peaks, strict=True)}

    head = "".join(f"{name:>13s}" for name in STAGES)
    print(f"{'':28s}{head}     step   items/s   x single (quartiles)     peak GiB   x single")
    for row in chosen:
        stages = [1000 * statistics.median(r[row.name][s] for r in taken) for s in range(len(STAGES))]
        total = statistics.median(sum(r[row.name]) for r in taken)
        cells = "".join(f"{ms:10.1f} ms" for ms in stages) + f"{1000 * total:6.0f} ms{args.batch / total:10.1f}"
        against, more = "", ""
        if row.single in memory and args.rounds > 1:
            ratios = [sum(r[row.name]) / sum(r[row.single]) for r in taken]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            against = f"{middle:.3f} ({low:.3f} - {high:.3f})"
            more = f"{memory[row.name] / memory[row.single]:.3f}"
        print(f"{row.name:28s}{cells}{against:>25s}{memory[row.name]:13.2f}{more:>11s}")
    print("x single: relative to the same U-Net without a modality, on single images, in the same precision.")


if __name__ == "__main__":
    main()
