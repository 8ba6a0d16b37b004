"""A frozen TensorFlow graph with the nodes of the Inception of 2015-12-05 and random weights, written without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

FLOAT, INT32, UINT8, STRING = 1, 3, 4, 7  # tensorflow.DataType


class Graph:
    """Adds nodes in the order in which they feed each other; every method returns the name of its node."""

    def __init__(self, seed: int) -> None:
        self.rng, self.proto = np.random.default_rng(seed), GraphDef()
        self.proto.versions.producer = (
            8  # before batch_norm_with_global_normalization was withdrawn, as in the original
        )
        self.channels: dict[str, int] = {}

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: AttrValue) -> str:
        self.proto.node.add(op=op, name=name, input=list(inputs), attr=attributes)
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        kind = FLOAT if value.dtype == np.float32 else INT32
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in value.shape])
        tensor = TensorProto(dtype=kind, tensor_shape=shape, tensor_content=value.tobytes())
        return self.node("Const", name, [], dtype=AttrValue(type=kind), value=AttrValue(tensor=tensor))

    def random(self, name: str, shape: Sequence[int], mean: float, deviation: float) -> str:
        value = mean + deviation * self.rng.standard_normal(shape)
        return self.constant(name, value.astype(np.float32))

    def conv(
        self, name: str, x: str, width: int, kernel: tuple[int, int], stride: int = 1, padding: str = "SAME"
    ) -> str:
        fan_in = kernel[0] * kernel[1] * self.channels[x]
        self.random(f"{name}/conv2d_params", (*kernel, self.channels[x], width), 0.0, (2 / fan_in) ** 0.5)
        self.node("Conv2D", f"{name}/Conv2D", [x, f"{name}/conv2d_params"], T=floats(), **window(stride, padding))
        norm = f"{name}/batchnorm"
        self.random(f"{norm}/beta", (width,), 0.1, 0.1)
        self.random(f"{norm}/gamma", (width,), 1.0, 0.1)
        self.random(f"{norm}/moving_mean", (width,), 0.0, 0.1)
        self.constant(f"{norm}/moving_variance", self.rng.uniform(0.7, 1.3, width).astype(np.float32))
        self.node(
            "BatchNormWithGlobalNormalization",
            norm,
            [f"{name}/Conv2D", *(f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma"))],
            T=floats(),
            variance_epsilon=AttrValue(f=0.001),
            scale_after_normalization=AttrValue(b=True),
        )
        message = AttrValue(s=norm.encode())
        self.node("CheckNumerics", f"{name}/CheckNumerics", [norm], T=floats(), message=message)
        self.node("Identity", f"{name}/control_dependency", [norm, f"^{name}/CheckNumerics"], T=floats())
        self.channels[name] = width
        return self.node("Relu", name, [f"{name}/control_dependency"], T=floats())

    def pool(self, op: str, name: str, x: str, size: int, stride: int, padding: str) -> str:
        self.channels[name] = self.channels[x]
        ksize = AttrValue(list=AttrValue.ListValue(i=[1, size, size, 1]))
        return self.node(op, name, [x], T=floats(), ksize=ksize, **window(stride, padding))

    def join(self, name: str, parts: Sequence[str]) -> str:
        self.constant(f"{name}/concat_dim", np.array(3, dtype=np.int32))
        self.channels[name] = sum(self.channels[part] for part in parts)
        return self.node("Concat", name, [f"{name}/concat_dim", *parts], T=floats(), N=AttrValue(i=len(parts)))

    def chain(
        self, x: str, *steps: tuple[str, int, tuple[int, int]], last_stride: int = 1, padding: str = "SAME"
    ) -> str:
        """Convolutions one after another; stride and padding are those of the last."""
        for name, width, kernel in steps[:-1]:
            x = self.conv(name, x, width, kernel)
        name, width, kernel = steps[-1]
        return self.conv(name, x, width, kernel, last_stride, padding)


def floats() -> AttrValue:
    return AttrValue(type=FLOAT)


def window(stride: int, padding: str) -> dict[str, AttrValue]:
    strides = AttrValue(list=AttrValue.ListValue(i=[1, stride, stride, 1]))
    return {"strides": strides, "padding": AttrValue(s=padding.encode())}


def inception_2015(seed: int = 0) -> GraphDef:
    """From "DecodeJpeg" to "softmax", with `classify_image_graph_def.pb`'s names and operations."""
    g = Graph(seed)
    g.node(
        "Placeholder",
        "DecodeJpeg",
        [],
        dtype=AttrValue(type=UINT8),
        shape=AttrValue(shape=TensorShapeProto(unknown_rank=True)),
    )
    g.node("Cast", "Cast", ["DecodeJpeg"], SrcT=AttrValue(type=UINT8), DstT=floats())
    g.constant("ExpandDims/dim", np.array(0, dtype=np.int32))
    g.node("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=floats())
    g.constant("ResizeBilinear/size", np.array([299, 299], dtype=np.int32))
    g.node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], T=floats())
    g.constant("Sub/y", np.array(128, dtype=np.float32))
    g.node("Sub", "Sub", ["ResizeBilinear", "Sub/y"], T=floats())
    g.constant("Mul/y", np.array(1 / 128, dtype=np.float32))
    x = g.node("Mul", "Mul", ["Sub", "Mul/y"], T=floats())
    g.channels[x] = 3

    x = g.conv("conv", x, 32, (3, 3), 2, "VALID")
    x = g.conv("conv_1", x, 32, (3, 3), padding="VALID")
    x = g.conv("conv_2", x, 64, (3, 3))
    x = g.pool("MaxPool", "pool", x, 3, 2, "VALID")
    x = g.conv("conv_3", x, 80, (1, 1), padding="VALID")
    x = g.conv("conv_4", x, 192, (3, 3), padding="VALID")
    x = g.pool("MaxPool", "pool_1", x, 3, 2, "VALID")
    for block, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        x = g.join(
            f"{block}/join",
            [
                g.conv(f"{block}/conv", x, 64, (1, 1)),
                g.chain(x, (f"{block}/tower/conv", 48, (1, 1)), (f"{block}/tower/conv_1", 64, (5, 5))),
                g.chain(
                    x,
                    (f"{block}/tower_1/conv", 64, (1, 1)),
                    (f"{block}/tower_1/conv_1", 96, (3, 3)),
                    (f"{block}/tower_1/conv_2", 96, (3, 3)),
                ),
                g.conv(
                    f"{block}/tower_2/conv",
                    g.pool("AvgPool", f"{block}/tower_2/pool", x, 3, 1, "SAME"),
                    pooled,
                    (1, 1),
                ),
            ],
        )
    x = g.join(
        "mixed_3/join",
        [
            g.conv("mixed_3/conv", x, 384, (3, 3), 2, "VALID"),
            g.chain(
                x,
                ("mixed_3/tower/conv", 64, (1, 1)),
                ("mixed_3/tower/conv_1", 96, (3, 3)),
                ("mixed_3/tower/conv_2", 96, (3, 3)),
                last_stride=2,
                padding="VALID",
            ),
            g.pool("MaxPool", "mixed_3/pool", x, 3, 2, "VALID"),
        ],
    )
    for block, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        x = g.join(
            f"{block}/join",
            [
                g.conv(f"{block}/conv", x, 192, (1, 1)),
                g.chain(
                    x,
                    (f"{block}/tower/conv", width, (1, 1)),
                    (f"{block}/tower/conv_1", width, (1, 7)),
                    (f"{block}/tower/conv_2", 192, (7, 1)),
                ),
                g.chain(
                    x,
                    (f"{block}/tower_1/conv", width, (1, 1)),
                    (f"{block}/tower_1/conv_1", width, (7, 1)),
                    (f"{block}/tower_1/conv_2", width, (1, 7)),
                    (f"{block}/tower_1/conv_3", width, (7, 1)),
                    (f"{block}/tower_1/conv_4", 192, (1, 7)),
                ),
                g.conv(
                    f"{block}/tower_2/conv", g.pool("AvgPool", f"{block}/tower_2/pool", x, 3, 1, "SAME"), 192, (1, 1)
                ),
            ],
        )
    x = g.join(
        "mixed_8/join",
        [
            g.chain(
                x,
                ("mixed_8/tower/conv", 192, (1, 1)),
                ("mixed_8/tower/conv_1", 320, (3, 3)),
                last_stride=2,
                padding="VALID",
            ),
            g.chain(
                x,
                ("mixed_8/tower_1/conv", 192, (1, 1)),
                ("mixed_8/tower_1/conv_1", 192, (1, 7)),
                ("mixed_8/tower_1/conv_2", 192, (7, 1)),
                ("mixed_8/tower_1/conv_3", 192, (3, 3)),
                last_stride=2,
                padding="VALID",
            ),
            g.pool("MaxPool", "mixed_8/pool", x, 3, 2, "VALID"),
        ],
    )
    for block, pooling in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
        wide = g.conv(f"{block}/tower/conv", x, 384, (1, 1))
        deep = g.chain(x, (f"{block}/tower_1/conv", 448, (1, 1)), (f"{block}/tower_1/conv_1", 384, (3, 3)))
        x = g.join(
            f"{block}/join",
            [
                g.conv(f"{block}/conv", x, 320, (1, 1)),
                g.conv(f"{block}/tower/mixed/conv", wide, 384, (1, 3)),
                g.conv(f"{block}/tower/mixed/conv_1", wide, 384, (3, 1)),
                g.conv(f"{block}/tower_1/mixed/conv", deep, 384, (1, 3)),
                g.conv(f"{block}/tower_1/mixed/conv_1", deep, 384, (3, 1)),
                g.conv(f"{block}/tower_2/conv", g.pool(pooling, f"{block}/tower_2/pool", x, 3, 1, "SAME"), 192, (1, 1)),
            ],
        )
    x = g.pool("AvgPool", "pool_3", x, 8, 1, "VALID")
    g.constant("pool_3/_reshape/shape", np.array([1, 2048], dtype=np.int32))
    g.node("Reshape", "pool_3/_reshape", [x, "pool_3/_reshape/shape"], T=floats())
    g.random("softmax/weights", (2048, 1008), 0.0, 0.05)
    g.random("softmax/biases", (1008,), 0.0, 1.0)
    g.node("MatMul", "softmax/logits/MatMul", ["pool_3/_reshape", "softmax/weights"], T=floats())
    g.node("BiasAdd", "softmax/logits", ["softmax/logits/MatMul", "softmax/biases"], T=floats())
    g.node("Softmax", "softmax", ["softmax/logits"], T=floats())
    return g.proto


def write_graph(path: Path, seed: int = 0) -> Path:
    path.write_bytes(inception_2015(seed).SerializeToString())
    return path
