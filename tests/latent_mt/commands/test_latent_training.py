"""Training latent models through the real command and the real Lightning: resume, processes, precision, bad input."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from make_golden_traces import FILE, LATENT_TRACES, latent_loss_trace
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from tiny import finish, finish_group, start, step_folder, words
from tiny_latent import LATENT, SIZE, UNET, newest_weights, train, write_config, write_pairs

from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import Interrupted, UserError
from guided_mt.runs.distributed import Processes
from guided_mt.runs.processes.claim import Claim
from guided_mt.runs.processes.launcher import Started
from latent_mt import LatentMTDiffusion
from latent_mt.commands import latent_sample
from latent_mt.runs import launched
from latent_mt.runs.configuration import load_config
from latent_mt.runs.run import make_trainer
from latent_mt.runs.targets import instantiate
from latent_mt.training.latent_diffusion import LatentTraining


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def rows(run) -> list[dict[str, str]]:
    with open(run / "progress.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def same(a, b) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("variant", ["any", "U"])
def test_resume_is_bit_for_bit(pairs, tmp_path, variant, accumulate):
    """4 steps == 2 steps, stop, the same command, 2 steps: weights, averages and every logged value."""
    more = [f"lightning.trainer.accumulate_grad_batches={accumulate}", "data.params.batch_size=2", "run.val_interval=2"]
    dropout = {"unet_config": {"target": "latent_mt.model.unet.UNetModel", "params": {**UNET, "dropout": 0.1}}}
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        file = write_config(
            tmp_path / f"{name}.yaml", pairs, tmp_path / name, mt_variant=variant, scale_by_std=True, **dropout
        )
        for total in stops:
            train(file, *more, f"run.total_steps={total}")
    for stem in ("model", "ema_0.9"):
        same(newest_weights(tmp_path / "whole", stem), newest_weights(tmp_path / "parts", stem))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert [row["step"] for row in rows(tmp_path / "whole")] == ["1", "2", "3", "4"]


def test_accumulation_is_the_larger_batch(pairs, tmp_path):
    """Two batches of 2 accumulated give the step of one batch of 4, to rounding."""
    found = []
    for name, more in (
        ("one", ["data.params.batch_size=4"]),
        ("two", ["data.params.batch_size=2", "lightning.trainer.accumulate_grad_batches=2"]),
    ):
        train(write_config(tmp_path / f"{name}.yaml", pairs, tmp_path / name), *more)
        found.append(newest_weights(tmp_path / name))
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-3, atol=2e-4)


def test_frozen_first_stage_and_learned_rest(pairs, tmp_path):
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    train(file, "run.total_steps=1", "run.save_interval=1")
    before = newest_weights(tmp_path / "a")
    train(file)
    after = newest_weights(tmp_path / "a")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(("first_stage_model.", "scale_factor")) for key in moved)
    assert any(".heads.paired." in key for key in moved) and any(".label_emb." in key for key in moved)
    assert any(key.startswith("model.diffusion_model.input_blocks.") for key in moved)


def test_averages_warm_up_and_older_runs_go_on_without(pairs, tmp_path):
    """min(rate, (1 + n) / (10 + n)) in a new run; a run whose configuration doesn't know of it keeps its constant rate."""
    key, run = "model.diffusion_model.time_embed.0.weight", tmp_path / "a"
    file = write_config(tmp_path / "a.yaml", pairs, run)

    def after(step: int, stem: str) -> torch.Tensor:
        return load_file(step_folder(run, step) / f"{stem}.safetensors")[key]

    train(file, "run.total_steps=2", "run.save_interval=1")
    expected = torch.lerp(after(1, "ema_0.9"), after(2, "model"), 1 - 3 / 12)
    assert torch.allclose(after(2, "ema_0.9"), expected, atol=1e-7)
    saved = step_folder(run, 2) / "config.yaml"
    assert "ema_warmup: true" in saved.read_text()
    saved.write_text(saved.read_text().replace("  ema_warmup: true\n", ""))
    with pytest.raises(UserError, match=r"run.ema_warmup \(False there, True here\)"):
        train(file, "run.total_steps=3", "run.ema_warmup=true")
    train(file, "run.total_steps=3", "run.save_interval=1")
    expected = torch.lerp(after(2, "ema_0.9"), after(3, "model"), 0.1)
    assert torch.allclose(after(3, "ema_0.9"), expected, atol=1e-7)
    assert "ema_warmup: false" in (step_folder(run, 3) / "config.yaml").read_text()


def test_scale_by_std_gives_unit_latents(pairs, tmp_path):
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a", scale_by_std=True)
    train(file, "run.total_steps=1")
    config = load_config(file)
    module, data = (
        instantiate({k: config["model"][k] for k in ("target", "params")}, "model"),
        instantiate(config["data"], "data"),
    )
    module.load_state_dict(newest_weights(tmp_path / "a"))
    assert float(module.scale_factor) != 1.0
    values = []
    for batch in data.stream(seed=0, total_steps=8):
        images = module.images(batch, SampleStreams(0, batch.positions))
        values += [images.x_start, *images.sides.values()]
    assert torch.cat(values).std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_processes_change_nothing(pairs, tmp_path, launcher):
    """Two processes of batch 2 train as one of batch 4, to rounding, whoever starts them (mpiexec: test_latent_guarantees)."""
    train(write_config(tmp_path / "one.yaml", pairs, tmp_path / "one"))
    file = write_config(tmp_path / "two.yaml", pairs, tmp_path / "two")
    argv = ["--config", str(file), "data.params.batch_size=2"]
    if launcher == "lightning":
        more = ["lightning.trainer.devices=2", "lightning.trainer.strategy=ddp"]
        printed = finish(start("latent_train.py", [*argv, *more]))
    else:  # a launcher's processes count, not what the file says for plain python
        printed = finish_group("latent_train.py", [*argv, "lightning.trainer.devices=1"])
    assert printed.count("# run folder") == 1  # announced once
    one, two = newest_weights(tmp_path / "one"), newest_weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4)


def signalled_at_step_2(monkeypatch, number: signal.Signals) -> None:
    """The signal comes while the second step of each run that is made is counted."""
    true_step = LatentTraining.after_step

    def after_step(self) -> None:
        true_step(self)
        if self.steps_done == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(LatentTraining, "after_step", after_step)


def steps_saved(run) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name, said", [("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")])
def test_signals_save_and_the_same_command_goes_on(pairs, tmp_path, monkeypatch, caplog, name, said):
    caplog.set_level("INFO", logger="guided_mt")
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    with monkeypatch.context() as patched, pytest.raises(Interrupted) if name == "SIGINT" else nullcontext():
        signalled_at_step_2(patched, signal.Signals[name])
        train(file, "run.total_steps=100000", "run.save_interval=100000")
    assert caplog.messages == [f"{said}: saved step 2; run the same command to go on"]
    assert steps_saved(tmp_path / "a") == [2]
    train(file, "run.total_steps=3")
    assert rows(tmp_path / "a")[-1]["step"] == "3"


def test_ctrl_c_before_the_first_step_is_one(pairs, tmp_path, monkeypatch):
    """Lightning makes an exit with code 1 of it."""
    monkeypatch.setattr(LatentTraining, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"))
    assert not (tmp_path / "a" / ".lock").exists()


def test_under_slurm_a_run_saves_in_its_own_folder_and_reads_nothing_of_lightnings(pairs, tmp_path, monkeypatch):
    """SIGUSR1 is `--signal=SIGUSR1@90`; a checkpoint that Lightning wrote for another run lies in the working directory."""
    for key, value in {"NTASKS": 1, "JOB_NAME": "train", "JOB_ID": 123, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    place = tmp_path / "working directory"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "hpc_ckpt_7.ckpt").write_text("of another run")
    signalled_at_step_2(monkeypatch, signal.SIGUSR1)
    train(file, "run.total_steps=4", "run.save_interval=100")
    assert steps_saved(tmp_path / "a") == [2, 4]
    assert [path.name for path in place.iterdir()] == ["hpc_ckpt_7.ckpt"]
    assert not list((tmp_path / "a").rglob("*.ckpt"))


def test_a_batch_script_of_several_tasks_is_one_process(pairs, tmp_path, monkeypatch):
    """Lightning would wait for the seven others of `sbatch --ntasks 8`, which srun alone would start."""
    for key, value in {"NTASKS": 8, "JOB_NAME": "train", "JOB_ID": 123, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"), "run.total_steps=1")
    assert steps_saved(tmp_path / "a") == [1]


def test_a_second_run_in_the_folder_stops_before_data_and_model_are_built(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("latent_mt.commands.training.instantiate", lambda *_: pytest.fail("built"))
    with (
        Claim(tmp_path / "a"),
        pytest.raises(UserError, match=rf"run.log_dir {tmp_path / 'a'}: this process is writing"),
    ):
        train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"))


@pytest.mark.parametrize("gpus, local_size, devices, nodes, place", [(4, 4, 4, 2, 2), (1, 4, 1, 8, 0)])
def test_lightning_is_told_of_the_launchers_processes(monkeypatch, gpus, local_size, devices, nodes, place):
    """A process that sees one GPU alone is a machine of its own to Lightning, and takes cuda:0."""
    found = Started("slurm", 6, 8, 2, local_size)
    monkeypatch.setattr(launched, "started", lambda: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    processes = Processes(6, 8, 2, torch.device("cuda", place), "slurm")
    options = launched.with_launcher({"devices": 1}, processes)
    (environment,) = options["plugins"]
    assert (options["devices"], options["num_nodes"], options["strategy"]) == (devices, nodes, "ddp")
    assert (environment.global_rank(), environment.world_size()) == (6, 8)
    assert (environment.local_rank(), environment.node_rank()) == (place, 6 // (8 // nodes))


def test_bf16(pairs, tmp_path):
    train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"), "lightning.trainer.precision=bf16-mixed")
    train(write_config(tmp_path / "b.yaml", pairs, tmp_path / "b"))
    a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert a != b
    assert float(a[0]["mse"]) == pytest.approx(float(b[0]["mse"]), rel=0.05)
    assert all(value.dtype == torch.float32 for value in newest_weights(tmp_path / "a").values())


def test_bf16_of_a_file_is_fp32_on_a_cpu_without(pairs, tmp_path, monkeypatch, capsys):
    """The run is fp32's from then on; a word on the command line is another matter, and so is a run that began in bf16."""
    monkeypatch.setattr("guided_mt.runs.precision.cpu_has_bf16", lambda: False)
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    file.write_text(file.read_text().replace("accelerator: cpu", "accelerator: cpu\n    precision: bf16-mixed"))
    key, fell = (
        "lightning.trainer.precision",
        "# precision 32-true and not bf16-mixed, for which this CPU has no instructions",
    )
    slow = "# warning: bf16-mixed on this CPU, which has no instructions for it, is many times slower than 32-true"

    def said(*words: str) -> list[str]:
        train(file, "run.total_steps=1", *words)
        return [line for line in capsys.readouterr().out.splitlines() if "32-true" in line and line.startswith("#")]

    assert said() == [fell]
    newest = tmp_path / "a" / "checkpoints" / "step_00000001" / "config.yaml"
    assert load_config(newest)["lightning"]["trainer"]["precision"] == "32-true"
    assert said(f"{key}=bf16-mixed", "--dry_run") == [slow]
    newest.write_text(newest.read_text().replace("32-true", "bf16-mixed"))
    assert said("--dry_run") == [slow]


def test_bf16_of_ldms_unet_is_fp32_on_a_cpu_without(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("guided_mt.runs.precision.cpu_has_bf16", lambda: False)
    unet = {"unet_config": {"target": "latent_mt.model.unet.UNetModel", "params": {**UNET, "use_bf16": True}}}
    train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a", **unet), "run.total_steps=1")
    fell = "# precision fp32 and not bf16, for which this CPU has no instructions"
    assert fell in capsys.readouterr().out
    latent_sample.main(words(model_path=tmp_path / "a", num_samples=1, steps=1, device="cpu", dry_run=False))
    assert fell in capsys.readouterr().out


def test_a_run_that_diverges_stops_and_keeps_its_weights(pairs, tmp_path):
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    train(file, "run.total_steps=2")
    before = newest_weights(tmp_path / "a")
    with pytest.raises(UserError, match=r"not finite 1\d steps in a row"):
        train(file, "run.total_steps=40", "model.learning_rate=9e8")
    same(before, newest_weights(tmp_path / "a"))


def spoil(monkeypatch, bad: range) -> None:
    """The losses of these 1-based steps of every run are infinite."""
    true_losses, steps = LatentMTDiffusion.losses, itertools.count(1)

    def losses(self, *args, **kwargs):
        found = true_losses(self, *args, **kwargs)
        if next(steps) in bad:
            found[0].loss = found[0].loss * float("inf")
        return found

    monkeypatch.setattr(LatentMTDiffusion, "losses", losses)


def test_a_row_of_skipped_steps_that_ends_before_a_look_is_noticed(pairs, tmp_path, monkeypatch):
    """Steps 2 to 19: at step 10 the row is of 9, at step 20 it is over."""
    spoil(monkeypatch, range(2, 20))
    with pytest.raises(UserError, match=r"step 20: .*not finite 18 steps in a row"):
        train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"), "run.total_steps=25")


@pytest.mark.parametrize("bad, stops", [(13, False), (30, True)])
def test_back_offs_of_the_loss_scale_are_no_divergence(pairs, tmp_path, monkeypatch, bad, stops):
    """In fp16 a run goes on while its scale of 2^16 can still fall, and it saves; at 2^0 a row of bad steps ends it."""

    def on_the_cpu(folder, options, processes):  # where Lightning's own choice for 16-mixed is bfloat16
        return make_trainer(folder, {**options, "plugins": [MixedPrecision("16-mixed", "cpu")]}, processes)

    monkeypatch.setattr("latent_mt.commands.training.make_trainer", on_the_cpu)
    spoil(monkeypatch, range(2, bad + 1))
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    if stops:
        with pytest.raises(UserError, match=r"step 30: .*not finite 1\d steps in a row"):
            train(file, "run.total_steps=30", "run.save_interval=5")
    else:
        train(file, "run.total_steps=15", "run.save_interval=5")
        assert rows(tmp_path / "a")[-1]["skipped_steps"] == "12"
    steps = [int(folder.name[5:]) for folder in (tmp_path / "a/checkpoints").iterdir()]
    assert sorted(steps) == [5, 10, 15]


def test_grids_and_validation(pairs, tmp_path):
    train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"), "run.sample_interval=4", "run.val_interval=2")
    with Image.open(tmp_path / "a/grids/step_00000004.png") as picture:
        assert picture.size[0] > 3 * SIZE
    assert float(rows(tmp_path / "a")[1]["val_paired"]) > 0
    assert list((tmp_path / "a").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", LATENT_TRACES)
def test_golden_loss_trace(name, tmp_path):
    """As guided_mt's in test_train."""
    expected = json.loads(FILE.read_text())[name]
    assert len(expected) == 20
    np.testing.assert_allclose(latent_loss_trace(name, tmp_path), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "model.params.unet_config.params.in_channels=3",
            r"in_channels 3 and out_channels 4 don't fit latents of 4 channels",
        ),
        ("model.params.channels=3", r"latents of 4 channels \(embed_dim\), but model.params.channels is 3"),
        (
            "model.params.image_size=16",
            rf"images of {SIZE} pixels give latents of {LATENT}, but model.params.image_size is 16",
        ),
        ("model.params.first_stage_config.target=ldm.models.autoencoder.AutoencoderK", "did you mean .*AutoencoderKL"),
        ("model.params.mt_variants=U", "unknown key 'mt_variants' .did you mean mt_variant"),
        ("model.params.unet_config.params.num_head=3", "unknown key 'num_head' .did you mean num_heads"),
        (
            "model.params.mt_sides=[photo,map]",
            r"mt_sides \['photo', 'map'\], but the data's sides are \['day', 'night'\]",
        ),
        ("model.params.mt_sides=[day]", "name the sides of an item, each once, or none"),
        ("model.params.mt_swap_prob=2", "mt_swap_prob must be between 0 and 1"),
        ("model.params.mt_variant=Y", "mt_variant 'Y' is none of U, X, any"),
        ("model.params.loss_type=l3", "loss_type 'l3' is none of l1, l2"),
        ("model.params.learn_logvar=true", "learn_logvar: only its default"),
        ("model.params.beta_schedule=lineer", "did you mean linear"),
        ("model.params.mt_weights=papre", "mt_weights 'papre' is none of paper, "),
        ("model.params.mt_sides=day", "mt_sides takes a list, not 'day'"),
        ("model.params.mt_loss_weight=-1", "mt_loss_weight must be at least 0"),
        ("model.params.scale_factor=0", "scale_factor must be a number above 0"),
        ("model.params.timesteps=0", "timesteps 0: must be at least 1"),
        ("model.params.linear_start=-1", "linear_start -1 .*: must be above 0"),
        ("model.params.given_betas=[0.1,2]", "given_betas: betas must be a list of numbers above 0"),
        ("model.params.ignore_keys=betas", "ignore_keys takes a list, not 'betas'"),
        ("model.params.ckpt_path=nowhere.ckpt", "nowhere.ckpt: no such file or folder"),
        ("model.params.unet_config=small", "unet_config: 'small' is no configuration"),
        ("model.params.unet_config.params=null", "unet_config.params: lacks image_size, in_channels"),
        ("model.params.unet_config.params.channel_mult=3", "channel_mult takes a list, not '3'"),
        ("model.params.unet_config.params.dropout=2", "dropout 2 must be a share"),
        ("model.params.first_stage_config.target=torch.nn.Identity", "torch.nn.Identity is no first stage"),
        ("lightning.trainer.accumulate_grad_batches=0", "accumulate_grad_batches 0: write a whole number of 1 or more"),
        ("data.params.image_size=15", "15"),
        ("data.params.image_siz=15", "unknown key 'image_siz'"),
        ("run.total_step=15", "unknown key 'total_step' .did you mean total_steps"),
        ("run.total_steps=many", "total_steps takes a whole number"),
        ("run.ema_rate=2", "ema_rate '2'"),
        ("run.images_per_step=3", "images_per_step 3, but .* are 4"),
        ("lightning.trainer.strategy=deepspeed", "'deepspeed': choose from auto, ddp, .*, fsdp"),
        ("lightning.trainer.precision=bf16-true", "bf16-true: .* take one of 32-true, bf16-mixed, 16-mixed"),
        ("lightning.trainer.precisio=16", "unknown key 'precisio'"),
    ],
)
def test_bad_settings(pairs, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"), override)
    assert not (tmp_path / "a/checkpoints").exists()


@pytest.mark.parametrize("word", ["--total_steps", "total_steps", "--limt"])
def test_words_that_are_no_settings(pairs, tmp_path, word):
    with pytest.raises(UserError, match=f"don't know what to do with '{word}'"):
        train(write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"), "run.seed=1", word)


def test_limit_and_dry_run(pairs, tmp_path, capsys):
    train(
        write_config(tmp_path / "a.yaml", pairs, tmp_path / "a"),
        "--dry_run",
        "run.seed=1",
        "--limit",
        "5",
        "run.seed=2",
    )
    printed = capsys.readouterr().out
    assert "limit: 5" in printed and "seed: 2" in printed and "M parameters to train" in printed
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.seed=1", "run.seed .0 there, 1 here"),
        ("data.params.batch_size=2", "run.images_per_step .4 there, 2 here"),
        ("model.params.mt_loss_weight=0.2", "mt_loss_weight .0.1 there, 0.2 here"),
        ("model.params.unet_config.params.num_heads=4", "num_heads .2 there, 4 here"),
        ("run.ema_rate=0.5", "no averaged weights for run.ema_rate 0.5"),
    ],
)
def test_a_run_refuses_other_settings(pairs, tmp_path, override, message):
    file = write_config(tmp_path / "a.yaml", pairs, tmp_path / "a")
    train(file, "run.total_steps=1")
    with pytest.raises(UserError, match=message):
        train(file, override)
