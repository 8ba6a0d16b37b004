"""Forward and backward of our U-Net against the same network with guided-diffusion's choices.

    python benchmarks/network.py [--image_size 64 --num_channels 64 --batch 4 --rounds 7 --device cpu]

The baseline is our network with the parts that cost time put back as guided-diffusion has them (`adm_style`). Every
round runs each row once, so that a busy machine slows all of them alike; printed are medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from guided_mt.networks.create import create_model
from guided_mt.networks.layers import AttentionBlock, GroupNorm32
from guided_mt.networks.unet import UNetModel


def adm_norm(self: GroupNorm32, x: Tensor) -> Tensor:
    return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).type(x.dtype)


def adm_modulated(self: GroupNorm32, x: Tensor, scale_shift: Tensor) -> Tensor:
    scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
    return self(x) * (1 + scale) + shift


def adm_attention(self: AttentionBlock, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
    """Attention by einsum in ADM's new order; guided-diffusion recomputes it in backward whatever --use_checkpoint."""

    def attend(x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        flat = x.reshape(batch, channels, -1)
        dim = channels // self.num_heads
        q, k, v = self.qkv(self.norm(flat)).chunk(3, dim=1)
        q, k, v = (part.reshape(batch * self.num_heads, dim, -1) for part in (q, k, v))
        scale = 1 / math.sqrt(math.sqrt(dim))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, -1)
        return (flat + self.proj_out(h)).reshape(batch, channels, *size)

    return checkpoint(attend, x, use_reentrant=True)


@contextlib.contextmanager
def adm_style() -> Iterator[None]:
    """While active, networks run with guided-diffusion's group norm, modulation and attention."""
    with (
        mock.patch.object(GroupNorm32, "forward", adm_norm),
        mock.patch.object(GroupNorm32, "modulated", adm_modulated),
        mock.patch.object(AttentionBlock, "forward", adm_attention),
    ):
        yield


def seconds(model: UNetModel, x: Tensor, t: Tensor) -> float:
    """One forward and backward pass."""
    synchronize = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    model.zero_grad(set_to_none=True)
    synchronize()
    start = time.perf_counter()
    model(x, t).square().mean().backward()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_channels", type=int, default=64)
    parser.add_argument("--num_res_blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = create_model(
        args.image_size,
        args.num_channels,
        args.num_res_blocks,
        learn_sigma=True,
        attention_resolutions="32,16,8",
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    ).to(args.device)
    for p in model.parameters():  # zero weights would let the convolutions multiply by zeros
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else None
    x = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    t = torch.randint(0, 1000, (args.batch,), device=args.device)

    times: dict[str, list[float]] = {"ADM's choices, fp32": [], "ours, fp32": [], "ours, bf16": []}
    for round_ in range(args.rounds + 1):
        for name, taken in times.items():
            baseline = name.startswith("ADM")
            model.precision = name[-4:]
            if baseline:
                model.to(memory_format=torch.contiguous_format)
            else:
                model.to_fast_layout()
            with adm_style() if baseline else contextlib.nullcontext():
                if args.device != "cpu":
                    seconds(model, x, t)  # a new layout tunes its kernels on first use
                elapsed = seconds(model, x, t)
            if round_:  # the first round warms up
                taken.append(elapsed)
    reference, *_ = times.values()
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(reference, taken, strict=True))
        print(f"{name:22s} {1000 * statistics.median(taken):8.1f} ms   {ratio:5.2f} x as fast as ADM's choices")


if __name__ == "__main__":
    main()
