"""Inception features by the original frozen graph, as a program of its own:

    python -m evaluations.features.tensorflow_worker images.npz graph.pb out.npz

TensorFlow and torch with torch-fidelity, lpips or Lightning abort in one process, so nothing here imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import EvaluationError, run
from ..files.images import open_images
from .features import SPATIAL_CHANNELS, extract

INPUT, POOL, MAPPED, SOFTMAX = "ExpandDims:0", "pool_3:0", "mixed_6/conv:0", "softmax/weights:0"


class TensorFlowInception:
    """The graph, fed with images in the place of its single decoded JPEG."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            with quiet():
                import tensorflow as tf

                gpus = tf.config.list_physical_devices("GPU")
                index = int(device.partition(":")[2] or 0)
                tf.config.set_visible_devices([] if device == "cpu" else gpus[index : index + 1], "GPU")
        except ImportError as error:
            raise EvaluationError(
                f"the tensorflow backend needs TensorFlow ({error}): pip install '.[tensorflow]'"
            ) from error
        tf.config.experimental.enable_tensor_float_32_execution(False)
        definition = tf.compat.v1.GraphDef()
        try:
            definition.ParseFromString(path.read_bytes())
        except Exception as error:  # DecodeError, of whichever protobuf TensorFlow brought
            raise EvaluationError(f"{path}: not a frozen TensorFlow graph, or a truncated one") from error

        # A session, not a tf.function: GraphDef version 9 withdrew this graph's batch norm, and only a session knows its version.
        graph = tf.Graph()
        with graph.as_default():
            self.images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3))
            try:
                self.outputs = tf.import_graph_def(definition, {INPUT: self.images}, [POOL, MAPPED], name="")
                softmax = graph.get_tensor_by_name(SOFTMAX)
            except (ValueError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise EvaluationError(f"{path}: not the Inception graph of 2015-12-05 ({reason})") from error
        options = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        options.gpu_options.allow_growth = True
        with quiet():
            self.session = tf.compat.v1.Session(graph=graph, config=options)
            self.softmax_weight = self.session.run(softmax)  # [2048, 1008]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W, 3] -> pool [B, 2048], spatial [B, 17 * 17 * 7]."""
        pool, mapped = self.session.run(self.outputs, {self.images: images.astype(np.float32)})
        return pool.reshape(len(images), -1), mapped[..., :SPATIAL_CHANNELS].reshape(len(images), -1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what TensorFlow's C++ writes on stderr while it starts, unless the start fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except ImportError:
            raise
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def end_with(parent: int) -> None:
    """Leave when the process that started this one is gone, however it went: nobody waits for the features then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str]) -> None:
    """Write the features of the images that `argv` names to its .npz. Ends with the process that started it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("graph", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--what", default="images")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    end_with(os.getppid())
    network = TensorFlowInception(args.graph, args.device)
    features = extract(open_images(args.images), network, args.batch_size, args.workers, args.what)
    features.save(args.out)


if __name__ == "__main__":
    run(main)
