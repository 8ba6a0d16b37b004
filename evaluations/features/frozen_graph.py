"""Weights of the frozen TensorFlow Inception graph of 2015-12-05, which FID is defined on, for torch-fidelity's module.

The graph file is read by its protocol buffer alone; TensorFlow is not needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaluationError

# Branches of the five kinds of blocks: TensorFlow's names below the block's name -> torch-fidelity's.
A = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
C = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
E = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BLOCKS = {
    "mixed": ("Mixed_5b", A),
    "mixed_1": ("Mixed_5c", A),
    "mixed_2": ("Mixed_5d", A),
    "mixed_3": ("Mixed_6a", B),
    "mixed_4": ("Mixed_6b", C),
    "mixed_5": ("Mixed_6c", C),
    "mixed_6": ("Mixed_6d", C),
    "mixed_7": ("Mixed_6e", C),
    "mixed_8": ("Mixed_7a", D),
    "mixed_9": ("Mixed_7b", E),
    "mixed_10": ("Mixed_7c", E),
}
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def convolutions() -> dict[str, str]:
    """Scope of every convolution in the graph -> name of its module."""
    names = {f"conv_{i}" if i else "conv": module for i, module in enumerate(STEM)}
    for block, (module, branches) in BLOCKS.items():
        names |= {f"{block}/{scope}": f"{module}.{branch}" for scope, branch in branches.items()}
    return names


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A frozen graph's constants as a state dict of torch-fidelity's `FeatureExtractorInceptionV3`.

    Raises EvaluationError where the file is no graph, or lacks a node of the Inception graph.
    """
    constants = read_constants(path)

    def take(name: str) -> np.ndarray:
        if name not in constants:
            raise EvaluationError(f"{path}: no constant '{name}', so not the Inception graph of 2015-12-05")
        return constants[name]

    state = {}
    for scope, module in convolutions().items():
        state[f"{module}.conv.weight"] = take(f"{scope}/conv2d_params").transpose(3, 2, 0, 1)  # HWIO -> OIHW
        state |= {f"{module}.bn.{ours}": take(f"{scope}/batchnorm/{theirs}") for theirs, ours in NORM.items()}
    state["fc.weight"], state["fc.bias"] = take("softmax/weights").T, take("softmax/biases")
    return {name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in state.items()}


def read_constants(path: Path) -> dict[str, np.ndarray]:
    """All float constants of a serialised GraphDef. Raises EvaluationError where the file is none."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT

    graph = GraphDef()
    try:
        graph.ParseFromString(Path(path).read_bytes())
    except DecodeError as error:
        raise EvaluationError(f"{path}: not a frozen TensorFlow graph, or a truncated one") from error
    constants = {}
    for node in graph.node:
        tensor = node.attr["value"].tensor
        if node.op == "Const" and tensor.dtype == DT_FLOAT:
            shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
            content = (
                np.frombuffer(tensor.tensor_content, "<f4") if tensor.tensor_content else np.array(tensor.float_val)
            )
            # One stored value stands for all of them (TensorProto.float_val).
            if content.size not in (1, int(np.prod(shape))):
                raise EvaluationError(
                    f"{path}: constant '{node.name}' has {content.size} values for shape {list(shape)}"
                )
            constants[node.name] = content.reshape(shape) if content.size != 1 else np.full(shape, content.item())
    return constants
