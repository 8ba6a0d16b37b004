"""The two backends agree: one random network, written as the frozen graph, in TensorFlow and in torch-fidelity's module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from inception_graph import inception_2015

from evaluations.errors import EvaluationError
from evaluations.features import backends, frozen_graph
from evaluations.features.inception import TorchInception, read_weights
from evaluations.files.images import open_images
from evaluations.scores.metrics import inception_score

pytest.importorskip("torch_fidelity", reason="the extra 'eval' is not installed")
SIZES = (32, 64, 256)

IN_TENSORFLOW = """
import sys
from pathlib import Path
import numpy as np
from evaluations.features.tensorflow_worker import TensorFlowInception
assert "torch" not in sys.modules
network = TensorFlowInception(Path(sys.argv[1]), "cpu")
outputs = {"softmax_weight": network.softmax_weight}
with np.load(sys.argv[2]) as images:
    for name in images:
        outputs["pool" + name], outputs["spatial" + name] = network(images[name])
np.savez(sys.argv[3], **outputs)
"""


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {str(size): rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8) for size in SIZES}


@pytest.fixture(scope="module")
def tensorflow(images, inception_pb, tmp_path_factory) -> dict[str, np.ndarray]:
    """What TensorFlow makes of the images, in a process of its own."""
    folder = tmp_path_factory.mktemp("tensorflow")
    np.savez(folder / "images.npz", **images)
    command = [sys.executable, "-c", IN_TENSORFLOW, inception_pb, folder / "images.npz", folder / "out.npz"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    with np.load(folder / "out.npz") as outputs:
        return dict(outputs)


@pytest.fixture(scope="module")
def network(inception_pb) -> TorchInception:
    return TorchInception(inception_pb)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Relative to the largest value, and for the values on average too; and the values are not all alike."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(ours - theirs).mean() < 1e-5 * np.abs(theirs).mean()
    assert theirs.std() > 0.1 * np.abs(theirs).mean()


@pytest.mark.parametrize("size", SIZES)
def test_features_agree(network, tensorflow, images, size):
    pool, spatial = network(images[str(size)])
    assert pool.shape == (3, 2048)
    assert spatial.shape == (3, 17 * 17 * 7)
    assert_close(pool, tensorflow[f"pool{size}"])
    assert_close(spatial, tensorflow[f"spatial{size}"])


def test_batches_change_rounding_only(network, images):
    whole = network(images["64"])
    parts = [network(images["64"][i : i + 1]) for i in range(3)]
    for i in (0, 1):
        np.testing.assert_allclose(np.concatenate([part[i] for part in parts]), whole[i], rtol=1e-4, atol=1e-5)


def test_softmax_agrees(network, tensorflow, images):
    def probabilities(pool, weight):
        return torch.softmax(torch.as_tensor(pool) @ torch.as_tensor(weight), dim=1).numpy()

    np.testing.assert_array_equal(network.softmax_weight, tensorflow["softmax_weight"])
    pool = np.concatenate([network(x)[0] for x in images.values()])
    theirs = np.concatenate([tensorflow[f"pool{size}"] for size in SIZES])
    assert_close(probabilities(pool, network.softmax_weight), probabilities(theirs, tensorflow["softmax_weight"]))
    score = inception_score(theirs, tensorflow["softmax_weight"])
    assert inception_score(pool, network.softmax_weight) == pytest.approx(score, rel=1e-5)
    assert score > 1.001


def test_spatial_features_are_rows_columns_channels(network, images):
    """Where a strip at the left of the image changes, the columns at the left change, of all rows."""
    image = images["256"][:1].copy()
    before = network(image)[1].reshape(17, 17, 7)
    image[:, :, :16] = 0
    changed = np.abs(network(image)[1].reshape(17, 17, 7) - before).max(axis=-1)
    assert changed[:, :3].min() > 10 * changed[:, 14:].max()


def test_names_are_those_of_the_graph_of_2015():
    names = json.loads((GOLDEN / "inception_2015_node_names.json").read_text())
    modules = {f"{scope}/conv2d_params": f"{module}.conv" for scope, module in frozen_graph.convolutions().items()}
    modules |= {f"{scope}/batchnorm": f"{module}.bn" for scope, module in frozen_graph.convolutions().items()}
    assert modules == {name: module for name, module in names.items() if not name.startswith("softmax")}


def test_both_kinds_of_weights_are_the_same_network(network, inception_pb, tmp_path, images):
    torch.save(read_weights(inception_pb), tmp_path / "weights.pth")
    other = TorchInception(tmp_path / "weights.pth")
    np.testing.assert_array_equal(other(images["32"])[0], network(images["32"])[0])
    assert other.sha256 != network.sha256


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_are_never_unpickled(tmp_path):
    torch.save({"fc.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(EvaluationError, match=r"trap\.pth: not a PyTorch file of tensors"):
        TorchInception(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["cut.pb", "text.pb", "text.pth", "cut.pth", "other.pth", "list.pth", "empty.pb", "odd.PB", "random.pth"]
)
def test_other_files_are_refused_by_name(name, tmp_path, inception_pb):
    path = tmp_path / name
    if name == "cut.pb":
        path.write_bytes(inception_pb.read_bytes()[:1_000_000])
    elif name == "cut.pth":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif name == "other.pth":
        torch.save({"layer.weight": torch.zeros(3)}, path)
    elif name == "odd.PB":
        graph = inception_2015()
        next(n for n in graph.node if n.name == "conv/conv2d_params").attr["value"].tensor.tensor_content = bytes(12)
        path.write_bytes(graph.SerializeToString())
    elif name == "random.pth":
        path.write_bytes(b"\x80\x02a.")
    elif name == "list.pth":
        torch.save([torch.zeros(3)], path)
    else:
        path.write_bytes(b"" if name == "empty.pb" else b"no weights here" * 10)
    with pytest.raises(EvaluationError, match=name.replace(".", r"\.")) as error:
        TorchInception(path)
    assert "\n" not in str(error.value)


def test_the_tensorflow_process_starts_where_the_package_is(monkeypatch, tmp_path):
    """Also in a clone that is not installed: -m finds `evaluations` in the folder that the process starts in."""
    started = {}

    def run(command, *, cwd, check):
        started.update(module=command[2], folder=Path(cwd))
        return subprocess.CompletedProcess(command, 2)

    backend = object.__new__(backends.TensorFlowBackend)
    backend.batch_size, backend.workers, backend.device, backend.path = 2, 0, "cpu", tmp_path / "graph.pb"
    monkeypatch.setattr(backends.subprocess, "run", run)
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit):
        backend.features(open_images(tmp_path / "images.npz"), "pool")
    assert started["folder"].joinpath(*started["module"].split(".")).with_suffix(".py").is_file()
