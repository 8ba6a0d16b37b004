"""Where a value comes from, presets, and configurations that are written and read again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf
from tiny import flags, step_folder, words

from guided_mt.commands import sample, train
from guided_mt.commands.console import with_saved_config
from guided_mt.errors import UserError
from guided_mt.generation.build import build_diffusion, build_model, model_sections, run_sections
from guided_mt.modalities.registry import TASKS
from guided_mt.modalities.settings import task_names
from guided_mt.runs.checkpoint import find_weights
from guided_mt.runs.config import Config, ModelConfig, SampleConfig, load_preset, parse, preset_names
from guided_mt.runs.loop_config import TrainConfig
from guided_mt.training.train_loop import batch_sizes

PAPER_PRESETS = {"masked-imagenet32": 32, "masked-imagenet64": 64, "masked-imagenet128": 128}


def resolved(*argv: str, **kwargs) -> Config:
    return parse(argv, run_sections(), description="", presets=True, **kwargs)


def test_later_sources_win(tmp_path):
    """dataclass < checkpoint < preset < --config < flag."""
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nweight_decay: 0.25\n")
    base = {"lr": 0.125, "weight_decay": 0.125, "total_steps": 7, "fp16_scale_growth": 3.0, "log_interval": 3}
    argv = ["--preset", "masked-digits", "--config", str(file), "--weight_decay", "0.75"]
    preset = load_preset("masked-digits")
    assert {"lr", "total_steps", "log_interval"} <= set(preset) and "fp16_scale_growth" not in preset
    config = resolved(*argv, base=base)
    assert config.weight_decay == 0.75  # the flag, over all
    assert config.lr == 0.5  # --config, over the preset
    assert config.total_steps == preset["total_steps"] != 7  # the preset, over the checkpoint
    assert config.fp16_scale_growth == 3.0  # the checkpoint, over the dataclass
    assert config.keep_checkpoints == preset.get("keep_checkpoints", 0)
    assert config.seed == TrainConfig().seed
    assert config.typed == {*preset, "lr", "weight_decay"}  # what the user set, the checkpoint not
    assert resolved("--config", str(file), "--preset", "masked-digits").lr == 0.5  # the order of typing does not matter


def test_defaults_are_the_dataclasses():
    config = resolved()
    for section in run_sections():
        assert config[section] == section()


@pytest.mark.parametrize(
    ("typed", "value"),
    [("True", True), ("true", True), ("1", True), ("yes", True), ("False", False), ("no", False), ("0", False)],
)
def test_booleans_as_adm_writes_them(typed, value):
    assert resolved("--learn_sigma", typed).learn_sigma is value


def test_numbers():
    config = resolved("--lr=7e-5", "--num_channels", "192", "--mask_patch", "-1", "--total_steps", "1000")
    assert (config.lr, config.num_channels, config.mask_patch, config.total_steps) == (7e-5, 192, -1, 1000)


def test_a_key_of_the_checkpoint_that_a_command_lacks_is_no_flag():
    config = parse([], (SampleConfig, *model_sections()), description="", base={"lr": 0.1, "image_size": 8})
    assert config.image_size == 8
    with pytest.raises(AttributeError):
        _ = config.lr


def test_every_flag_has_a_help_text_and_one_meaning():
    """Flags that two sections share must agree, since they are one flag."""
    seen: dict[str, type] = {}
    for section in (SampleConfig, *run_sections()):
        for field in dataclasses.fields(section):
            assert len(field.metadata["help"]) > 0, field.name
            if field.name in seen and section is not SampleConfig:
                assert field.name in ("batch_size", "device", "dry_run"), f"{field.name} is in two sections"
            seen[field.name] = section
    for task in TASKS.values():
        assert task.options in run_sections() and task.options in model_sections()


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", preset_names())
def test_presets_build(name):
    """Every key is known, and the model and process can be built (on the meta device, without memory)."""
    preset = load_preset(name)
    config = resolved("--preset", name, *([] if "data_dir" in preset else ["--data_dir", "somewhere"]))
    train.validate(config)
    assert {key: config.as_dict()[key] for key in preset} == preset
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) > 1e5
    assert model.image_size == config.image_size and list(model.heads) == task_names(config)
    assert build_diffusion(config).num_timesteps == config.diffusion_steps
    assert batch_sizes(config, 1)[0] > 1


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_presets_of_the_paper_are_appendix_e2(name):
    config = resolved("--preset", name)
    wanted = {"diffusion_steps": 1000, "noise_schedule": "cosine", "num_channels": 192, "num_res_blocks": 3}
    wanted |= {"lr": 7e-5, "rescale_timesteps": False, "rescale_learned_sigmas": False, "mask_max_patches": 10}
    wanted |= {"image_size": PAPER_PRESETS[name], "global_batch_size": 80, "mt_weights": "paper", "learn_sigma": True}
    assert {key: config.as_dict()[key] for key in wanted} == wanted


# ---------------------------------------------------------------- written and read again


def test_a_runs_configuration_can_be_fed_back(tmp_path):
    """config.yaml of a run, with --config, is the same run: nothing else is needed to repeat it."""
    first, again = tmp_path / "first", tmp_path / "again"
    train.main(flags(log_dir=first, total_steps=2, mt_variant="U", batch_size=4, global_batch_size=8))
    saved = OmegaConf.to_container(OmegaConf.load(first / "config.yaml"))
    known = {field.name for section in run_sections() for field in dataclasses.fields(section)}
    assert saved.keys() == known
    assert (saved["global_batch_size"], saved["mt_variant"], saved["diffusion_steps"]) == (8, "U", 40)
    train.main(words(config=first / "config.yaml", log_dir=again))
    repeated = OmegaConf.to_container(OmegaConf.load(again / "config.yaml"))
    assert {key for key in known if saved[key] != repeated[key]} == {"log_dir"}
    weights = [(step_folder(run, 2) / "model.safetensors").read_bytes() for run in (first, again)]
    assert weights[0] == weights[1]

    # the batch that the run had is saved, not how it came about
    train.main(words(config=first / "config.yaml", log_dir=tmp_path / "implied", global_batch_size=-1, batch_size=4))
    assert OmegaConf.load(tmp_path / "implied" / "config.yaml")["global_batch_size"] == 4


def test_a_checkpoint_carries_its_configuration(tmp_path):
    """--model_path is all that sampling needs, and a flag may not contradict the network."""
    run = tmp_path / "run"
    train.main(flags(log_dir=run, total_steps=1, mt_weights="bridge", batch_size=2, timestep_respacing=""))

    def sampling(*argv: str) -> Config:
        return with_saved_config(["--model_path", str(run), *argv], sample.SECTIONS, "")

    config = sampling()
    assert (config.num_channels, config.mt_weights, config.diffusion_steps) == (32, "bridge", 40)
    assert config.batch_size == SampleConfig().batch_size  # training's batch is no default for sampling
    assert config.device == ""
    assert sampling("--num_channels", "32", "--timestep_respacing", "5").timestep_respacing == "5"
    assert sampling("--precision", "bf16").precision == "bf16"
    with pytest.raises(UserError, match=r"mt_weights \(bridge there, paper here\)"):
        sampling("--mt_weights", "paper")

    # A training that goes on changes what is newest, not what this command draws from.
    file = find_weights(config.model_path, config.ema)
    train.main(flags(log_dir=run, total_steps=2, mt_weights="bridge", batch_size=2, timestep_respacing=""))
    assert find_weights(run, config.ema) != file == find_weights(config.model_path, config.ema)


@pytest.mark.parametrize(
    ("typed", "processes", "expected"),
    [
        ({"global_batch_size": 8}, 1, (8, 8, 8)),
        ({"global_batch_size": 8}, 4, (8, 2, 2)),
        ({"batch_size": 8}, 2, (16, 8, 8)),  # ADM: batch_size is per process
        ({"batch_size": 8, "microbatch": 3}, 1, (8, 8, 3)),
        ({"batch_size": 2, "global_batch_size": 8}, 2, (8, 4, 2)),  # gradients are accumulated
        ({"global_batch_size": 8, "microbatch": 100}, 2, (8, 4, 4)),
        ({}, 2, (2, 1, 1)),
    ],
    ids=str,
)
def test_batch_sizes(typed, processes, expected):
    assert batch_sizes(resolved(*words(**typed)), processes) == expected


def test_batch_that_does_not_divide():
    with pytest.raises(UserError, match="--global_batch_size 10 does not divide by 4 processes; take 8"):
        batch_sizes(resolved("--global_batch_size", "10"), 4)


def test_run_folder(monkeypatch):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    default = train.run_folder(resolved("--mt_task", "masked"))
    assert str(default).startswith("runs/")
    monkeypatch.setenv("OPENAI_LOGDIR", "/elsewhere")  # ADM's way to say it
    assert str(train.run_folder(resolved())) == "/elsewhere"
    assert str(train.run_folder(resolved("--log_dir", "/there"))) == "/there"


@pytest.mark.parametrize(
    ("said", "means"), [("True", "True"), ("no", "False"), (True, "True"), (False, "False"), ("reduce-overhead",) * 2]
)
def test_compile_is_a_switch_with_a_third_position(said, means):
    assert parse(["--compile", str(said)], (ModelConfig,), description="").compile == means
    assert parse([], (ModelConfig,), description="", base={"compile": said}).compile == means  # a run's config.yaml
    with pytest.raises(UserError, match="'fast' is none of False, True, reduce-overhead"):
        parse(["--compile", "fast"], (ModelConfig,), description="")
