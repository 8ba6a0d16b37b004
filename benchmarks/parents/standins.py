"""What the parents import and a machine may lack, or has in a version that their code can't use: small modules in its place.

They do no more than the compared code asks of them. Each is noted, so that the table can say what stood in.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def module(name: str, **attributes: Any) -> types.ModuleType:
    """A module of these attributes under its name, with empty packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if above not in sys.modules:
            sys.modules[above] = types.ModuleType(above)
            sys.modules[above].__path__ = []  # type: ignore[attr-defined]
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    sys.modules[name] = made
    if len(parts) > 1:
        setattr(sys.modules[".".join(parts[:-1])], parts[-1], made)
    return made


def for_guided_diffusion(checkout: Path) -> list[str]:
    """Make `guided_diffusion` importable; returns what stands in."""
    sys.path.insert(0, str(checkout))

    class World:
        """MPI's communicator of a single process."""

        rank, size = 0, 1

        def Get_rank(self) -> int:
            return 0

        def Get_size(self) -> int:
            return 1

        def bcast(self, value: Any, root: int = 0) -> Any:
            return value

    # Always: to import the true one starts MPI, which some machines refuse outside of a launcher.
    module("mpi4py", MPI=types.SimpleNamespace(COMM_WORLD=World()))
    made = ["mpi4py"]
    if importlib.util.find_spec("blobfile") is None:
        import os

        module(
            "blobfile", BlobFile=open, join=os.path.join, dirname=os.path.dirname, exists=os.path.exists,
            listdir=os.listdir, isdir=os.path.isdir, basename=os.path.basename,
        )  # fmt: skip
        made.append("blobfile")
    return made


def for_latent_diffusion(checkout: Path) -> list[str]:
    """Make `ldm` importable; returns what stands in."""
    sys.path.insert(0, str(checkout))

    class LightningModule(nn.Module):
        """The part of Lightning's module that is no training."""

        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

    # Always: the imports of 2022 are at other places by now.
    module("pytorch_lightning", LightningModule=LightningModule)
    module("pytorch_lightning.utilities.distributed", rank_zero_only=lambda function: function)

    class NotHere(nn.Module):
        def __init__(self, *args: Any, **kwargs: Any):
            raise ImportError(
                "taming-transformers' VectorQuantizer2 is in its repository, not in the package of its name"
            )

    made = ["pytorch_lightning"]
    try:
        from taming.modules.vqvae.quantize import VectorQuantizer2 as _found  # noqa: F401
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == "taming"]:
            del sys.modules[name]
        module("taming.modules.vqvae.quantize", VectorQuantizer2=NotHere)
        made.append("taming")
    if importlib.util.find_spec("einops") is None:
        from functorch.einops import rearrange

        module("einops", rearrange=rearrange, repeat=_repeat, reduce=None)
        made.append("einops")
    return made


def _repeat(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops.repeat for the one pattern that the compared code uses."""
    if pattern != "b -> b d":
        raise NotImplementedError(f"einops.repeat of '{pattern}'")
    return x[:, None].expand(-1, sizes["d"])


@contextmanager
def given_normals(*draws: Tensor):
    """Inside, torch.randn_like and torch.randn return these tensors in turn: both sides then take the same noise."""
    left = list(draws)
    original = torch.randn_like, torch.randn

    def take(*args: Any, **kwargs: Any) -> Tensor:
        return left.pop(0)

    torch.randn_like, torch.randn = take, take  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn_like, torch.randn = original
