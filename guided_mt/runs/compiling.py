"""`--compile`: what torch.compile is asked for, in training and in sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

CUDA_GRAPHS = "reduce-overhead"  # torch's name for it
COMPILE = ("False", "True", CUDA_GRAPHS)  # the values of --compile
Function = TypeVar("Function", bound=Callable)


def compiled(function: Function, how: str) -> Function:
    """`function`, or a module, compiled as `how` says, one of COMPILE.

    Sizes are constants: each size of batch that occurs has a graph of its own, which is faster than one for all, and CUDA graphs
    know no other. What CUDA graphs return is overwritten by their next call; whoever keeps it makes a copy.
    """
    if how == "False":
        return function
    return cast(Function, torch.compile(function, dynamic=False, mode=how if how == CUDA_GRAPHS else None))
