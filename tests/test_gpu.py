"""benchmarks/gpu.py without a GPU: what becomes of a check's errors, of time that is over, and of a slow or wrong device.

That no step waits is in tests/guided_mt/training/test_waits.py.
"""

from __future__ import annotations

import json
import time

import pytest
import torch
from tiny import ROOT


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from device.runner import Run

    return Run(torch.device("cpu"), tmp_path, 1.0, time.monotonic())


def test_every_check_leaves_a_result(run):
    from device.runner import Needs, Stage, Wrong, within

    def fails():
        raise Wrong("too far", error=2.0)

    def breaks():
        return {}["key"]

    def lacks():
        import no_such_package

        return {"it": no_such_package}

    def needs():
        raise Needs("a card")

    stage = Stage("right", run, 30)
    stage.check("good", lambda: within(0.5, 1.0))
    for check in (fails, breaks, lacks, needs):
        stage.check(check.__name__, check)
    stage.check("too long", lambda: {}, takes=1000.0)
    stage.check("not a number", lambda: within(float("nan"), 1.0))
    stage.measure("speed", lambda: {"images/s": 3.0})
    found = json.loads((run.out / "gpu.json").read_text())
    assert [(r["name"], r["verdict"]) for r in found["results"]] == [
        ("good", "passed"),
        ("fails", "FAILED"),
        ("breaks", "FAILED"),
        ("lacks", "not run"),
        ("needs", "not run"),
        ("too long", "left out"),
        ("not a number", "FAILED"),
        ("speed", "measured"),
    ]
    assert len(run.failed) == 3 and found["torch"] == torch.__version__
    assert "no_such_package" in found["results"][3]["note"] and "it takes about 1000 s" in found["results"][5]["note"]
    assert "| fails | FAILED | error 2; too far |" in (run.out / "gpu.md").read_text()


def test_only_some_checks(run):
    from device.runner import Stage

    stage = Stage("right", run, 30, only=["words"])
    stage.check("of words", dict)
    stage.check("of numbers", dict)
    stage.leave_out("others", "needs cuda")
    assert [result.name for result in run.results] == ["of words"]


def test_a_wrong_device_is_found(run, monkeypatch):
    from device.right import draws, samplers
    from device.runner import Wrong

    cpu = torch.device("cpu")
    draws.to_the_bit(cpu)
    one, two = draws._streams(cpu), draws._streams(cpu)
    two._draw = 1
    streams = iter([one, two])
    monkeypatch.setattr(draws, "_streams", lambda device: next(streams))
    with pytest.raises(Wrong, match="differ from the CPU's"):
        draws.to_the_bit(cpu)
    samplers.compare("dpm++", cpu)
    exact = samplers.Exact.__call__

    def wrong_in_float32(self, y, t):
        return exact(self, y, t) * (1.01 if y.dtype == torch.float32 else 1)

    monkeypatch.setattr(samplers.Exact, "__call__", wrong_in_float32)
    with pytest.raises(Wrong):
        samplers.compare("dpm++", cpu)


def test_operations_and_cards():
    from benchmarks.device import flops
    from benchmarks.device.forms import TINY

    single, given = (flops.per_image(form, TINY) for form in ("single", "X"))
    assert single < given < 1.1 * single  # a convolution of three more channels, and a head
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989 and flops.peak("a card of tomorrow") is None


def test_precisions_allow_little():
    from benchmarks.device.right.arithmetic import BF16, FP16, FP32

    network = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3) for _ in range(30)))
    allowed = [precision.tolerance(network) for precision in (FP32, FP16, BF16)]
    assert allowed == sorted(allowed) and allowed[0] < 2e-4 and allowed[2] < 0.2


def test_kid_on_the_device_is_the_evaluators(run):
    """A bare machine lacks torch-fidelity, so the formula stands twice: it must give the same."""
    pytest.importorskip("torch_fidelity")
    from device.distances import kernel_distance

    from evaluations.scores.kid import kernel_distance as evaluators

    x, y = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    expected, _ = evaluators(x.double().numpy(), (y + 0.3).double().numpy())
    assert kernel_distance(x, y + 0.3) == pytest.approx(expected, rel=1e-5)


def test_kernels_of_operations_on_many_tensors(monkeypatch):
    """PyTorch's limits: 320 chunks of 65,536 numbers, and of the optimiser's four tensors per weight 36, in one launch."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from launches import of_many

    assert [of_many([1] * count, 4, "12") for count in (1, 36, 37, 72, 73)] == [1, 1, 2, 2, 3]
    assert [of_many([65536 * chunks], 1, "12") for chunks in (320, 321, 640, 641)] == [1, 2, 2, 3]
    assert of_many([1] * 446, 4, "13") == 2
