"""One process of `processes`: `python -m device.right.member BACKEND DEVICE COUNT PORT FOLDER RANK`. The first writes said.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from guided_mt.runs.distributed import ALL_GATHER, Processes

from ..forms import TINY, batches, make_loop
from .arithmetic import joined

STEPS = 3


def main(backend: str, device: str, count: str, port: str, folder: str, rank: str) -> None:
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # numbers are compared
    if backend == "nccl" or int(count) > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=address, world_size=int(count), rank=int(rank))
    found = collectives(place, Path(folder)) if backend == "nccl" else train(place, int(count), int(rank), Path(folder))
    if int(rank) == 0:
        (Path(folder) / "said.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def train(device: torch.device, count: int, rank: int, folder: Path) -> dict[str, Any]:
    """Some steps; each one's row of progress.csv."""
    processes = Processes(rank, count, 0, device, "torchrun")
    # Form U with images: head variances, a frame and a record of several columns are learned from all processes.
    loop = make_loop("U", TINY, device, folder / str(rank), "--dropout", "0", processes=processes)
    rows = []
    for batch in batches(loop, STEPS):
        loop.run_step(batch.to(device))
        rows.append({name: float(value) for name, value in loop.report_row().items() if name in ("loss", "grad_norm")})
    return {"rows": rows}


def collectives(device: torch.device, folder: Path) -> dict[str, Any]:
    """A gather, a sum, and the gradient of a wrapped network, which one process must not change."""
    values = torch.arange(6, dtype=torch.float32, device=device).view(3, 2)
    gathered, summed = torch.empty_like(values), values.clone()
    ALL_GATHER(gathered, values)
    dist.all_reduce(summed)
    assert torch.equal(gathered, values) and torch.equal(summed, values), "a collective changed the values"
    loop = make_loop("U", TINY, device, folder)
    batch = batches(loop, 1)[0].to(device)
    gradients = []
    for wrapped in (False, True):
        if wrapped:
            loop.network = DistributedDataParallel(
                loop.network, device_ids=[device.index], broadcast_buffers=False, gradient_as_bucket_view=True
            )
        loop.model.zero_grad(set_to_none=True)
        loss, _ = loop.losses(batch, slice(0, len(batch.images)))
        loss.backward()
        gradients.append(joined(p.grad for p in loop.model.parameters() if p.grad is not None))
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert difference < 1e-5, f"the wrapped network's gradient differs by {difference:.2g}"
    return {"gradient": difference}


if __name__ == "__main__":
    main(*sys.argv[1:])
