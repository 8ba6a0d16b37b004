"""One of several processes that run training commands one after another, each as a group of its own, and note what they hold.

    RANK=r WORLD_SIZE=n ... python tests/support/sharded_runs.py FILE

FILE: JSON {"runs": [[port, argv], ...], "port": another, "out": folder}. Into out/rRANK.json goes a list with the elements of the
network, of its parts here, of their moments and averages, for each run; last what a gradient of infinity in one process did.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from guided_mt.runs import distributed
from guided_mt.runs.processes.shards import gathered, own_part, shard
from guided_mt.training.optim import guard_step
from latent_mt.commands import latent_train
from latent_mt.training.latent_diffusion import LatentTraining


def held_by(training: LatentTraining) -> dict[str, int]:
    parameters = list(training.averaged.parameters())
    state = training.trainer.optimizers[0].state
    return {
        "whole": sum(p.numel() for p in parameters),
        "parts": sum(own_part(p).numel() for p in parameters),
        "gradients": sum(own_part(p).numel() for p in parameters if p.requires_grad),
        "moments": sum(own_part(moments["exp_avg"]).numel() for moments in state.values()),
        "averages": sum(a.numel() for averages in training.ema.averages.values() for a in averages),
    }


def infinity_in_one_process(port: int) -> dict[str, Any]:
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layer = nn.Linear(3, 5)
    norm_of_ones = layer.weight.numel() ** 0.5
    before = layer.weight.detach().clone()
    shard(layer, nn.Conv2d, "cpu")
    optimizer = torch.optim.AdamW([layer.weight], lr=1.0, fused=True)
    layer.weight.grad = torch.ones_like(layer.weight)
    norm, _ = guard_step(optimizer, [layer.weight.grad], 0.0)
    if dist.get_rank() == 1:
        own_part(layer.weight.grad).view(-1)[0] = float("inf")
    _, bad = guard_step(optimizer, [layer.weight.grad], 0.0)
    optimizer.step()
    whole = gathered(layer.weight)
    distributed.Processes().close()
    return {
        "norm": float(norm) / norm_of_ones,
        "bad": float(bad),
        "moved": bool(whole.numel()) and not torch.equal(whole, before),
    }


def main(file: Path) -> None:
    torch.set_num_threads(1)
    plan, kept = json.loads(file.read_text()), dict(os.environ)
    held: list[dict[str, Any]] = []
    after_step = LatentTraining.after_step

    def noted(self: LatentTraining) -> None:
        after_step(self)
        held[-1] = held_by(self)

    LatentTraining.after_step = noted  # type: ignore[method-assign]
    for port, argv in plan["runs"]:
        os.environ.update(kept, MASTER_PORT=str(port))
        held.append({})
        latent_train.main(argv)
        distributed.Processes().close()
    os.environ.update(kept)
    held.append(infinity_in_one_process(plan["port"]))
    (Path(plan["out"]) / f"r{kept['RANK']}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
