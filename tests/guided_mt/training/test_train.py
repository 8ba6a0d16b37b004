"""Training end to end, through scripts/image_train.py: resuming, launchers, what a run writes, what it starts from."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden_traces import FILE as LOSS_TRACES
from make_golden_traces import TRACES, loss_trace
from PIL import Image
from tiny import (
    adm_unet,
    assert_same,
    column,
    contents,
    finish,
    finish_group,
    flags,
    mpiexec,
    progress,
    start,
    step_folder,
    task_flags,
    torchrun,
    wait_for,
)

from guided_mt.commands import export
from guided_mt.commands.console import run as run_command
from guided_mt.commands.train import main
from guided_mt.errors import UserError
from guided_mt.generation.build import build_model, run_sections
from guided_mt.modalities.registry import TASKS
from guided_mt.networks.model import VARIANTS
from guided_mt.runs import checkpoint
from guided_mt.runs.config import parse
from guided_mt.training import train_loop
from guided_mt.training.objective import multi_task_losses

# Everything that has a state: two averages, the importance sampler, dropout; a picture at step 3, long enough to be killed in.
STATEFUL = {
    "ema_rate": "0.9,0.99",
    "schedule_sampler": "loss-second-moment",
    "dropout": 0.1,
    "lr": 1e-3,
    "total_steps": 4,
    "save_interval": 2,
    "sample_interval": 3,
}


def few_steps(run: Path, steps: int = 2, **values) -> Path:
    """Train in this process; returns the run's folder."""
    main(flags(log_dir=run, total_steps=steps, **values))
    return run


def forbid_mpi4py(folder: Path) -> tuple[dict[str, str], Path]:
    """Environment in which an import of mpi4py fails and leaves a file, and that file."""
    marker, package = folder / "mpi4py-was-imported", folder / "poison" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('not here')\n")
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}, marker


# ---------------------------------------------------------------- resuming


def test_kill_9_and_the_same_command_again_change_nothing(tmp_path):
    """4 steps == 2 steps + kill -9 + the same command + 2 steps: weights, averages, optimiser, losses, bit for bit. As a program,
    with dropout; every modality and form is in test_guarantees."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(flags(log_dir=whole, **STATEFUL))
    command = flags(log_dir=killed, **STATEFUL)
    env, marker = forbid_mpi4py(tmp_path)

    process = start("image_train.py", command, **env)
    wait_for(lambda: step_folder(killed, 2).exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoint.checkpoints(killed)] == ["step_00000002"]
    assert "resuming after step 2" in finish(start("image_train.py", command, **env))

    for step in (2, 4):
        expected, found = contents(step_folder(whole, step)), contents(step_folder(killed, step))
        assert {"model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors", "training_state.pt"} < set(found)
        for one in (expected, found):
            del one["config.yaml"]  # names its own folder
        assert_same(expected, found)
    assert progress(whole) == progress(killed)
    assert [row["step"] for row in progress(killed)] == ["1", "2", "3", "4"]
    assert not marker.exists(), "plain python imported mpi4py"


@pytest.mark.parametrize("variant", ["U", "X"])
def test_a_run_of_version_0_1_goes_on(variant, tmp_path):
    """Its --mt_loss_weight was a number, its modalities had no state, and its log had fewer values."""
    settled = {"mt_variant": variant, "log_interval": 3, "save_interval": 2}
    run = few_steps(tmp_path, 3, **settled)
    whole = progress(run)
    shutil.rmtree(step_folder(run, 3))  # as if stopped between steps 2 and 3
    checkpoint = step_folder(run, 2)
    settings = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(settings.replace("mt_loss_weight: '0.1'", "mt_loss_weight: 0.1"))
    assert "mt_loss_weight: '0.1'" in settings
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    del state["modalities"]
    averages = state["averages"]
    count = averages["sums"].shape[1] - (variant == "U")  # rms_masked is new
    state["averages"] = {key: averages[key][:, :count] for key in ("sums", "counts")}
    state["averages"]["norms"] = averages["scalars"]["grad_norm"]
    torch.save(state, checkpoint / "training_state.pt")
    few_steps(run, 3, **settled)
    (found,), (expected,) = progress(run), whole
    assert all(found[name] == expected[name] for name in ("loss", "masked", "masked_q0", "grad_norm"))


def test_a_log_interval_goes_on_after_resuming(tmp_path):
    """Saved in the middle of an interval: its line is that of the run without a break."""
    run = few_steps(tmp_path, 4, log_interval=4, save_interval=3)
    whole = progress(run)
    shutil.rmtree(step_folder(run, 4))  # as if killed between steps 3 and 4
    few_steps(run, 4, log_interval=4, save_interval=3)
    assert progress(run) == whole and [row["step"] for row in whole] == ["4"]


def test_sigterm_saves_and_exits_0(tmp_path):
    run, total = tmp_path / "run", 60
    command = flags(log_dir=run, total_steps=total, mt_variant="U")
    process = start("image_train.py", command)
    wait_for(lambda: (run / "progress.csv").exists() and len(progress(run)) > 0, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    (saved,) = checkpoint.checkpoints(run)
    stopped = checkpoint.checkpoint_step(saved)
    assert 0 < stopped < total
    assert f"SIGTERM: saved step {stopped}; run the same command to go on" in output

    main(command)
    few_steps(tmp_path / "whole", total, mt_variant="U")
    assert progress(run) == progress(tmp_path / "whole")
    assert_same(
        contents(step_folder(run, total))["training_state.pt"],
        contents(step_folder(tmp_path / "whole", total))["training_state.pt"],
    )


def test_finished_run_does_nothing_more(tmp_path):
    run = few_steps(tmp_path, 2)
    before = contents(step_folder(run, 2))
    main(flags(log_dir=run, total_steps=2))
    assert_same(before, contents(step_folder(run, 2)))
    assert len(progress(run)) == 2


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """30 steps of global batch 8 in one process."""
    return few_steps(tmp_path_factory.mktemp("one"), 30)


def assert_same_losses(run: Path, reference: Path, steps: int) -> None:
    rows, expected = progress(run), progress(reference)[:steps]
    assert len(rows) == steps
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9, nan_ok=True), (name, row["step"])


def test_4_processes(one_process, tmp_path):
    run = tmp_path / "run"
    output = finish_group("image_train.py", flags(log_dir=run, total_steps=4), 4)
    assert "4 process(es) by torchrun" in output and "2 per process" in output
    assert_same_losses(run, one_process, 4)


def test_torchrun_2_processes(one_process, tmp_path):
    run, (env, marker) = tmp_path / "run", forbid_mpi4py(tmp_path)
    output = finish(start("image_train.py", flags(log_dir=run, total_steps=4), torchrun(2), **env))
    assert "2 process(es) by torchrun" in output
    assert_same_losses(run, one_process, 4)
    assert not marker.exists(), "torchrun's processes imported mpi4py"


def test_mpiexec_2_processes_stop_together_on_sigterm_and_resume(one_process, tmp_path):
    """The signal reaches one rank only; both save the same step and end well."""
    run, total = tmp_path / "run", 30
    command = flags(log_dir=run, total_steps=total)
    process = start("image_train.py", command, mpiexec(2))
    wait_for(lambda: (run / "progress.csv").exists() and len(progress(run)) > 0, process)
    ranks = [pid for pid in _descendants(process.pid) if Path(_command(pid)[0]).name.startswith("python")]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGTERM)
    assert "SIGTERM: saved step" in finish(process)
    (saved,) = checkpoint.checkpoints(run)
    assert 0 < checkpoint.checkpoint_step(saved) < total
    finish(start("image_train.py", command, mpiexec(2)))
    assert_same_losses(run, one_process, total)


def _descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [deeper for child in children for deeper in _descendants(child)]


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


@pytest.mark.parametrize("how", [{"microbatch": 2}, {"microbatch": 3}, {"batch_size": 4}])
def test_micro_batches_change_nothing(how, one_process, tmp_path):
    few_steps(tmp_path, 4, **how)
    assert_same_losses(tmp_path, one_process, 4)


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize(
    "values",
    [
        {"mt_variant": "X"},
        {"mt_variant": "U", "mt_weights": "bridge", "mt_drop_prob": 0.3},
        {"mt_task": "none"},
        {"mt_variant": "X", "mt_loss_weight": 0},
        {"class_cond": True, "num_classes": 10, "mt_task": "none"},
        {"predict_xstart": True, "precision": "bf16"},
    ],
    ids=str,
)
def test_a_few_steps_reduce_the_loss(values, tmp_path):
    run = few_steps(tmp_path, 60, lr=2e-3, global_batch_size=16, log_interval=10, **values)
    loss = column(run, "mse")
    assert loss[-1] < 0.75 * loss[0]
    assert math.isfinite(column(run, "loss")[-1])


def test_every_task_trains(tmp_path):
    """A row of TASKS is picked up by the command line with no other edit."""
    for name in TASKS:
        for variant in VARIANTS:
            own = task_flags(name, tmp_path)
            run = few_steps(tmp_path / f"{name}{variant}", 2, mt_task=name, mt_variant=variant, **own)
            assert all(math.isfinite(value) for value in column(run, name))


def test_without_the_modality_loss_its_head_stays_as_it_was(tmp_path):
    """--mt_loss_weight 0: the head is not trained, the rest is; otherwise both are."""
    torch.manual_seed(0)
    fresh = build_model(parse(flags(), run_sections(), description="")).state_dict()
    for weight in (0, 0.1):
        state = contents(step_folder(few_steps(tmp_path / str(weight), 2, mt_loss_weight=weight), 2))[
            "model.safetensors"
        ]
        changed = {key for key in fresh if not torch.equal(fresh[key], state[key])}
        heads = {key for key in fresh if key.startswith("heads.")}
        assert heads and bool(heads & changed) == (weight > 0)
        assert "condition_in.weight" in changed and "out.2.weight" in changed
        assert "head_variance.masked.error_sum" in changed


def test_mt_weights_none_and_mt_task_none_are_different_runs(tmp_path):
    """With no frame, form U's denoiser still shares its body with the head; the first loss before any step is ADM's."""
    frame = few_steps(tmp_path / "none", 1, mt_variant="U", mt_weights="none")
    single = few_steps(tmp_path / "single", 1, mt_task="none")
    assert column(frame, "mse") == column(single, "mse")


def test_dropped_modalities_leave_its_loss_out(tmp_path):
    run = few_steps(tmp_path, 2, mt_drop_prob=1)
    assert all(math.isnan(value) for value in column(run, "masked"))
    assert not contents(step_folder(run, 2))["model.safetensors"]["head_variance.masked.error_count"].any()


@pytest.mark.parametrize("name", TRACES)
def test_golden_loss_trace(name, tmp_path):
    """20 steps on the CPU; `python tests/make_golden_traces.py` writes the file anew, in a commit that says why."""
    expected = json.loads(LOSS_TRACES.read_text())[name]
    assert len(expected) == 20
    np.testing.assert_allclose(loss_trace(name, tmp_path), expected, rtol=1e-4)


# ---------------------------------------------------------------- what a run writes


def test_run_folder_and_checkpoint_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = few_steps(tmp_path / "run", 4, save_interval=1, keep_checkpoints=2, sample_interval=2, ema_rate="0.9,0.99")
    assert {path.name for path in run.iterdir() if not path.name.startswith("events.")} == {
        "config.yaml",
        "progress.csv",
        "checkpoints",
        "grids",
    }
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000003", "step_00000004"]
    newest = contents(step_folder(run, 4))
    assert set(newest) == {
        "config.yaml",
        "classes.json",
        "model.safetensors",
        "ema_0.9.safetensors",
        "ema_0.99.safetensors",
        "training_state.pt",
    }
    assert json.loads(newest["classes.json"]) == [str(digit) for digit in range(10)]
    assert newest["config.yaml"] == (run / "config.yaml").read_bytes()
    assert newest["training_state.pt"]["step"] == 4
    model, slow, fast = (newest[f"{name}.safetensors"] for name in ("model", "ema_0.99", "ema_0.9"))
    key = "out.2.weight"
    start = torch.zeros_like(model[key])  # this layer is zero before training: averages lag behind, the slower the more
    assert (slow[key] - start).norm() < (fast[key] - start).norm() < (model[key] - start).norm()

    grids = sorted((run / "grids").iterdir())
    assert [grid.name for grid in grids] == ["step_00000002.png", "step_00000004.png"]
    with Image.open(grids[-1]) as picture:
        assert picture.mode == "RGB" and np.asarray(picture).std() > 0

    board = EventAccumulator(str(run))
    board.Reload()
    tags = board.Tags()
    for name in ("loss", "mse", "vb", "masked"):
        assert {name, *(f"{name}_q{q}" for q in range(4))} <= set(tags["scalars"])
    assert {"grad_norm", "lr", "skipped_steps", "images_per_second"} <= set(tags["scalars"])
    assert tags["images"] == ["preview"]
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in board.Scalars("masked")] == pytest.approx(column(run, "masked"), rel=1e-6)


def test_quartiles_surround_the_mean(tmp_path):
    """The mean over all timesteps lies between those of the quartiles, which differ."""
    run = few_steps(tmp_path, 8, log_interval=8, global_batch_size=16)
    (row,) = progress(run)
    quartiles = [float(row[f"masked_q{q}"]) for q in range(4)]
    assert min(quartiles) <= float(row["masked"]) <= max(quartiles)
    assert len(set(quartiles)) == 4


def test_classes_are_those_of_the_checkpoint(tmp_path):
    """Resumed with data that lost a class, the ids stay; with data that has a new one, the run refuses."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    for name in ("ant", "bee", "cow"):
        (data / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(data / name / f"{i}.png")
    settings = {"data_dir": data, "class_cond": True, "num_classes": 3, "data_workers": 0}
    run = few_steps(tmp_path / "run", 1, **settings)
    shutil.rmtree(data / "ant")
    few_steps(run, 2, **settings)
    assert json.loads((step_folder(run, 2) / "classes.json").read_text()) == ["ant", "bee", "cow"]
    (data / "bee").rename(data / "dog")
    with pytest.raises(UserError, match="dog"):
        few_steps(run, 3, **settings)


# ---------------------------------------------------------------- ADM's checkpoints in and out


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("variant", ["X", "U"])
def test_starts_exactly_as_the_loaded_adm_model(variant, half, tmp_path, capsys):
    """An ADM .pt into a model with a head and condition inputs: same output before training; exported, the same file."""
    unet = adm_unet()
    state = {key: value.half() if half else value for key, value in unet.state_dict().items()}
    torch.save(state, tmp_path / "adm.pt")
    unet.load_state_dict({key: value.float() for key, value in state.items()})

    config = parse(flags(mt_variant=variant), run_sections(), description="")
    model = build_model(config).eval()
    new = checkpoint.load_weights(model, tmp_path / "adm.pt", allow_new=True)
    assert any(key.startswith("heads.") for key in new) and ("condition_in.weight" in new) == (variant == "X")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 30])
    given = {"masked": torch.randn(2, 3, 8, 8)} if variant == "X" else {}
    with torch.no_grad():
        assert torch.equal(model(x, t, given).output, unet(x, t))
        assert unet(x, t).abs().max() > 0.1
    assert all(value.dtype == torch.float32 for value in model.parameters())

    # the same through the command line; with a rate of zero nothing moves
    main(
        flags(log_dir=tmp_path / "run", total_steps=1, lr=0, mt_variant=variant, resume_checkpoint=tmp_path / "adm.pt")
    )
    export.main(["--model_path", str(tmp_path / "run"), "--ema", "none", "--out", str(tmp_path / "out" / "back.pt")])
    back = torch.load(tmp_path / "out" / "back.pt", weights_only=True)
    assert_same(back, {key: value.float() for key, value in state.items()})
    assert "left out: " in capsys.readouterr().out


def test_resume_checkpoint_takes_a_run_too(tmp_path):
    """The U-Net of one run starts another with other settings; --log_dir's own checkpoint has the last word."""
    first = few_steps(tmp_path / "first", 2, mt_task="none")
    second = few_steps(tmp_path / "second", 1, mt_variant="X", resume_checkpoint=first, lr=0)
    weights = contents(step_folder(first, 2))["model.safetensors"]
    moved = contents(step_folder(second, 1))["model.safetensors"]
    assert all(torch.equal(moved[key], value) for key, value in weights.items())
    few_steps(second, 2, mt_variant="X", resume_checkpoint=tmp_path / "gone", lr=0)


# ---------------------------------------------------------------- when things go wrong


def exit_code(argv: list[str], capsys) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv)
    return stopped.value.code, capsys.readouterr().err


def test_absurd_learning_rate_stops_and_keeps_the_good_checkpoint(tmp_path, capsys):
    run = few_steps(tmp_path / "run", 2, save_interval=1, keep_checkpoints=2)
    good = contents(step_folder(run, 2))
    command = flags(log_dir=run, total_steps=100, save_interval=1, keep_checkpoints=2, lr=1e30)
    code, error = exit_code(command, capsys)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert "not finite" in line and "--lr" in line
    assert_same(good, contents(step_folder(run, 2)))
    # step 3 was finite and moved the weights to 1e30; every later step was skipped, and none of them was saved
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_00000002", "step_00000003"]
    rows = progress(run)
    assert int(rows[-1]["step"]) <= 20 and int(rows[-1]["skipped_steps"]) >= 10


def test_poisoned_weights_stop_within_ten_steps(tmp_path, capsys):
    state = adm_unet().state_dict()
    state["out.2.weight"] = torch.full_like(state["out.2.weight"], 1e38)  # finite, and no loss of it is
    torch.save(state, tmp_path / "huge.pt")
    run = tmp_path / "run"
    code, error = exit_code(flags(log_dir=run, total_steps=50, resume_checkpoint=tmp_path / "huge.pt"), capsys)
    assert code == 2 and "10 steps in a row" in error
    assert [row["skipped_steps"] for row in progress(run)] == [str(step) for step in range(1, 11)]
    assert checkpoint.checkpoints(run) == []


def test_one_bad_step_is_skipped_and_counted(tmp_path, monkeypatch):
    """A single non-finite loss: the weights and the optimiser stay, the counter says 1, the save waits for a good step."""
    true_losses = multi_task_losses
    seen = []

    def poisoned(*args, **kwargs):
        losses = true_losses(*args, **kwargs)
        seen.append(losses)
        if len(seen) == 2:
            losses.loss = losses.loss * float("inf")
        return losses

    monkeypatch.setattr("guided_mt.training.step.multi_task_losses", poisoned)
    run = few_steps(tmp_path, 4, save_interval=2)
    assert [row["skipped_steps"] for row in progress(run)] == ["0", "1", "1", "1"]
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_00000003", "step_00000004"]
    state = contents(step_folder(run, 4))
    assert all(value.isfinite().all() for value in state["model.safetensors"].values())
    assert state["training_state.pt"]["optimizer"]["adamw"]["state"][0]["step"] == 3


def test_a_row_of_skipped_steps_that_ends_before_a_look_is_noticed(tmp_path, monkeypatch):
    """Steps 2 to 19: at step 10 the row is of 9, at step 20 it is over."""
    true_losses, steps = train_loop.TrainLoop.losses, itertools.count(1)

    def losses(self, batch, part):
        loss, record = true_losses(self, batch, part)
        return loss * (float("inf") if next(steps) in range(2, 20) else 1), record

    monkeypatch.setattr(train_loop.TrainLoop, "losses", losses)
    with pytest.raises(UserError, match=r"step 20: .*not finite 18 steps in a row"):
        few_steps(tmp_path, 25)


@pytest.mark.parametrize("limit", [1_000, 1_200_000], ids=["no room at all", "room for the weights"])
def test_full_disk_while_saving_keeps_the_previous_checkpoint(limit, tmp_path, capsys):
    run = few_steps(tmp_path / "run", 2)
    good = contents(step_folder(run, 2))
    sizes = {file.name: file.stat().st_size for file in step_folder(run, 2).iterdir()}
    assert sizes["model.safetensors"] < 1_200_000 < sizes["training_state.pt"]
    with file_size_limit(limit):
        code, error = exit_code(flags(log_dir=run, total_steps=3), capsys)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    if limit > 1_000:  # else the log itself may be the first that can't be written
        assert "step_00000003" in line and "earlier checkpoints are intact" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert_same(good, contents(step_folder(run, 2)))
    few_steps(run, 3)  # and with room again the run goes on
    assert step_folder(run, 3).exists()


class file_size_limit:
    """No file of this process may grow beyond `limit` bytes: what a full disk looks like to it."""

    def __init__(self, limit: int):
        self.limit = limit

    def __enter__(self) -> None:
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.old[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


def test_half_written_checkpoint_is_not_found_and_goes_away(tmp_path):
    """What kill -9 leaves while saving has a name that nothing reads; the next save removes it."""
    run = few_steps(tmp_path, 2)
    half = run / "checkpoints" / ".tmp_step_00000003"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    few_steps(run, 3)
    assert not half.exists()
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_00000002", "step_00000003"]
