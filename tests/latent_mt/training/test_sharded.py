"""Strategy fsdp: two processes that share the weights out train as one does, hold half each, and leave and read ddp's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, finish, free_ports, progress, start_python, step_folder
from tiny_latent import DIT, UNET, newest_weights, train, write_config, write_pairs
from tiny_tasks import entries, write_data, write_tasks

from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import read_state

FSDP = "lightning.trainer.strategy=fsdp"
HALF = "data.params.batch_size=2"
LOOKS = ["run.val_interval=4", "run.sample_interval=4", "run.grad_clip=0.5"]
# Of form any, on pairs: passes accumulated and computed again, averages in bf16 on the host, rounded at random.
THRIFTY = ["run.ema_dtype=bf16", "run.ema_device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs by name: `label` of form U, whose label is encoded by the network, and `pairs` of form any, each by one process and
    by two that share it out; `dit` is `label` of a transformer."""
    folder = tmp_path_factory.mktemp("sharded")
    write_data(folder)
    write_pairs(folder / "scenes")
    thrifty = {"target": "latent_mt.model.unet.UNetModel", "params": {**UNET, "use_checkpoint": True}}

    def label(name: str) -> Path:
        run = folder / name
        return write_tasks(folder / f"{name}.yaml", folder, run, mt_variant="U", mt_tasks=entries(["label"], folder))

    def dit(name: str) -> Path:
        network, run = {"target": "models.DiT", "params": DIT}, folder / name
        tasks = entries(["label"], folder)
        return write_tasks(folder / f"{name}.yaml", folder, run, mt_variant="U", mt_tasks=tasks, unet_config=network)

    def pairs(name: str) -> Path:
        return write_config(folder / f"{name}.yaml", folder / "scenes", folder / name, unet_config=thrifty)

    train(label("label"), *LOOKS)
    train(label("begun whole"), "run.total_steps=2", "run.grad_clip=0.5")
    train(pairs("pairs"), *THRIFTY)
    train(dit("dit"))
    accumulated = ["data.params.batch_size=1", "lightning.trainer.accumulate_grad_batches=2"]
    runs = [
        [label("label by two"), FSDP, HALF, *LOOKS],
        [label("stopped"), FSDP, HALF, "run.grad_clip=0.5", "run.total_steps=2"],
        [label("stopped"), FSDP, HALF, "run.grad_clip=0.5"],
        [label("begun whole"), FSDP, HALF, "run.grad_clip=0.5"],
        [dit("dit by two"), FSDP, HALF],
        [pairs("pairs by two"), "lightning.trainer.strategy=fsdp2", *accumulated, *THRIFTY],
    ]
    *own, last = free_ports(len(runs) + 1)
    argv = [[port, ["--config", str(run[0]), *run[1:]]] for port, run in zip(own, runs, strict=True)]
    (folder / "plan.json").write_text(json.dumps({"runs": argv, "port": last, "out": str(folder)}))
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(last)}
    file = ROOT / "tests" / "support" / "sharded_runs.py"
    members = [
        start_python(file, [str(folder / "plan.json")], RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]
    for member in members:
        finish(member)
    # what two processes shared out, one takes up
    shutil.copytree(folder / "label by two", folder / "begun by two")
    shutil.rmtree(step_folder(folder / "begun by two", 4))
    train(label("begun by two"), "run.grad_clip=0.5")
    return folder


def read_png(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def near(a: Path, b: Path, rounded: bool = False) -> None:
    """Weights, averages, moments and rows of two runs, to rounding. rounded: the averages are in bfloat16."""
    for stem in ("model", "ema_0.9"):
        one, two = newest_weights(a, stem), newest_weights(b, stem)
        assert one.keys() == two.keys()
        for key in one:
            digit = 2**-7 if stem != "model" and rounded else 1e-3  # bfloat16's last
            torch.testing.assert_close(one[key], two[key], rtol=digit, atol=2e-4, msg=key)
        different = sum(int((one[key] != two[key]).sum()) for key in one) / sum(map(torch.numel, one.values()))
        assert stem == "model" or not rounded or different < 0.01  # the same draws of rounding
    states: list[Any] = [read_state(step_folder(run, 4) / "training_state.pt") for run in (a, b)]
    one, two = (state["optimizers"][0]["state"] for state in states)
    assert one.keys() == two.keys()
    for index in one:
        for name in one[index]:
            torch.testing.assert_close(one[index][name], two[index][name], rtol=1e-3, atol=1e-4)
    rows = [{row["step"]: row for row in progress(run)} for run in (a, b)]
    assert rows[0].keys() == rows[1].keys() == {"1", "2", "3", "4"}
    for step, row in rows[0].items():
        for name in set(row) & {"loss", "mse", "label", "night", "grad_norm", "val_loss", "skipped_steps"}:
            if row[name] and rows[1][step].get(name):
                assert float(rows[1][step][name]) == pytest.approx(float(row[name]), rel=1e-4), (step, name)


@pytest.mark.parametrize("a, b", [("label", "label by two"), ("dit", "dit by two"), ("pairs", "pairs by two")])
def test_two_processes_that_share_the_weights_out_train_as_one(folder, a, b):
    near(folder / a, folder / b, rounded=a == "pairs")
    one, two = ({path.name: read_png(path) for path in (folder / run / "grids").glob("*")} for run in (a, b))
    assert one.keys() == two.keys() and len(one) == (a == "label")  # drawn by both together
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2)


@pytest.mark.parametrize("run", ["begun whole", "begun by two"])
def test_a_run_goes_on_under_the_other_strategy(folder, run):
    near(folder / "label", folder / run)


def test_resume_is_bit_for_bit(folder):
    whole, stopped = folder / "label by two", folder / "stopped"
    for stem in ("model", "ema_0.9"):
        one, two = newest_weights(whole, stem), newest_weights(stopped, stem)
        assert not [key for key in one if not torch.equal(one[key], two[key])]


def test_each_process_holds_half(folder):
    ranks = [json.loads((folder / f"r{rank}.json").read_text()) for rank in range(2)]
    for run in range(6):
        first, second = (rank[run] for rank in ranks)
        for what in ("parts", "averages"):
            assert first[what] + second[what] == first["whole"]
            assert second[what] > 0.48 * first["whole"]  # a tensor of one row can't be cut
        for rank in (first, second):
            assert rank["moments"] == rank["gradients"]
    for rank in ranks:  # infinity in one of them
        assert rank[-1] == {"norm": pytest.approx(1), "bad": 1.0, "moved": False}


def test_fp16_is_refused(tmp_path):
    file = write_config(tmp_path / "a.yaml", write_pairs(tmp_path / "scenes"), tmp_path / "a")
    with pytest.raises(UserError, match="strategy fsdp: not with precision 16-mixed; take bf16-mixed, or ddp"):
        train(file, FSDP, "lightning.trainer.precision=16-mixed")
    assert not (tmp_path / "a/checkpoints").exists()


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("label", {"mt_task_weighting": "uncertainty"}, "weights that are learned"),
        ("label", {"mt_task_weighting": "nash"}, "or measured"),
        ("label", {"mt_timestep_weights": "learned"}, "weights that are learned"),
        ("caption", {}, "caption reads weights between the network's passes"),
    ],
)
def test_what_needs_whole_replicas(task, options, message, tmp_path):
    """What is learned or measured over tasks and timesteps beside the network, and modalities that use weights outside of it."""
    if options.get("mt_task_weighting") == "nash":
        pytest.importorskip("torchjd")
    write_data(tmp_path)
    tasks = entries([task], tmp_path)
    file = write_tasks(tmp_path / "x.yaml", tmp_path, tmp_path / "run", mt_variant="U", mt_tasks=tasks, **options)
    with pytest.raises(UserError, match=f"strategy fsdp: .*{message}"):
        train(file, FSDP)
