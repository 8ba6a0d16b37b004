"""LDM's YAML files: every published model's configuration resolves and builds; bad input gets one clear line."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from omegaconf import OmegaConf
from torch import nn

from guided_mt.errors import UserError
from latent_mt.runs import lr_scheduler, targets
from latent_mt.runs import trainer_options as trainer_options_of
from latent_mt.runs.configuration import check_shape, load_config, replaced
from latent_mt.runs.targets import instantiate, parameters, register, resolve
from latent_mt.runs.trainer_options import trainer_options

CONFIGS = json.loads((GOLDEN / "ldm_configs.json").read_text())  # of LDM's folders `models` and `configs`
UNETS, FIRST_STAGES = (
    json.loads(gzip.decompress((GOLDEN / f"ldm_{part}_keys.json.gz").read_bytes())) for part in ("unet", "first_stage")
)


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 400, text
    return text


def write(folder: Path, content: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else OmegaConf.to_yaml(OmegaConf.create(content)))
    return path


# ---------------------------------------------------------------- LDM's files


@pytest.mark.parametrize("name", CONFIGS)
def test_ldms_files_read_and_build(name, tmp_path):
    config = load_config(write(tmp_path, CONFIGS[name]))
    assert config == CONFIGS[name]
    model = {key: config["model"][key] for key in ("target", "params")}
    with torch.device("meta"):
        built = instantiate(model, "model")
    assert isinstance(built, resolve(model["target"]))
    shapes = {key: list(value.shape) for key, value in built.state_dict().items()}
    if name in UNETS:
        unet = {k.removeprefix("model.diffusion_model."): v for k, v in shapes.items() if k.startswith("model.")}
        assert unet == UNETS[name]["state_dict"]
    if name in FIRST_STAGES:
        assert shapes == FIRST_STAGES[name]["state_dict"]


def test_data_that_we_do_not_have_is_parsed_but_not_built():
    data = CONFIGS["ldm/cin256"]["data"]
    for config in (data, data["params"]["train"], CONFIGS["ldm/bsr_sr"]["data"]):
        text = complaint(instantiate, config, "data")
        assert text.startswith(f"data: {config['target']} is not built here") and "latent_mt.data.ImageData" in text


def test_other_clip_encoders_are_named():
    for name in ("FrozenCLIPTextEmbedder", "FrozenClipImageEmbedder", "FrozenOpenCLIPImageEmbedder"):
        text = complaint(resolve, f"ldm.modules.encoders.modules.{name}")
        assert name in text and "FrozenOpenCLIPEmbedder and FrozenCLIPEmbedder alone" in text


def test_what_stands_for_ldms_callbacks_is_said():
    lines = replaced(CONFIGS["configs/cin-ldm-vq-f8"])
    assert len(lines) == 1 and lines[0].startswith("lightning.callbacks.image_logger: main.ImageLogger")
    assert "run.sample_interval" in lines[0] and not replaced(CONFIGS["ldm/cin256"])


# ---------------------------------------------------------------- reading

SMALL = {"model": {"target": "torch.nn.Identity", "base_learning_rate": 1e-4, "params": {"a": [1, 2], "b": {"c": 3}}}}


def test_overrides_apply_in_order(tmp_path):
    path = write(tmp_path, SMALL)
    words = [
        "model.params.b.c=5",
        "model.params.b.c=6",
        "model.params.new.deep=1e-4",
        "model.params.a.1=7",
        "run.total_steps=5",
        "model.params.flag=true",
        "model.params.b={d: 1}",
    ]
    config = load_config(path, words)
    assert config["model"]["params"] == {"a": [1, 7], "b": {"c": 6, "d": 1}, "new": {"deep": 1e-4}, "flag": True}
    assert config["run"] == {"total_steps": 5} and type(config["model"]["params"]) is dict
    assert load_config(path) == SMALL


def test_interpolations_are_resolved(tmp_path):
    config = load_config(write(tmp_path, SMALL), ["model.params.e=${model.params.b.c}"])
    assert config["model"]["params"]["e"] == 3


FILES = [
    ("model:\n  target: [", r"config.yaml, line \d: not valid YAML"),
    ("", "a YAML file with the keys model, data, lightning, run"),
    ("- 1\n- 2", "a YAML file with the keys"),
    ("modell: {target: x}", r"unknown key 'modell' \(did you mean model\?\)"),
    ("data: {target: x}", "has no 'model:"),
    ("model: 5", "'model' must hold 'key: value' lines, not '5'"),
    ("model: {params: {}}", "model has no target"),
    ("model: {target: torch.nn.Identity, parms: {}}", r"model: unknown key 'parms' \(did you mean params\?\)"),
    ("model: {target: torch.nn.Identitty}", r"model: unknown target 'torch.nn.Identitty' \(did you mean torch.nn.Id"),
    ("model: {target: os.system}", "unknown target 'os.system'"),
    (
        "model: {target: torch.nn.Identity, params: {u: {target: subprocess.run}}}",
        "model.params.u: unknown target 'subprocess.run'",
    ),
    ("model: {target: torch.nn.Identity, base_learning_rate: fast}", "base_learning_rate takes a number, not 'fast'"),
    ("model: {target: torch.nn.Identity, base_learning_rate: 1, learning_rate: 1}", "give one of them"),
    ("model: {target: torch.nn.Identity}\ndata: {path: x}", r"data: unknown key 'path'"),
    ("model: {target: torch.nn.Identity}\nlightning: {trainr: {}}", r"lightning: unknown key 'trainr' \(did you mean"),
    ("model: {target: torch.nn.Identity}\nlightning: {trainer: 3}", "lightning: 'trainer' must hold"),
    ("model: {target: torch.nn.Identity}\nrun: fast", "'run' must hold 'key: value' lines"),
    (
        "model: {target: torch.nn.Identity, params: {a: '???'}}",
        "model.params.a has no value; give it as model.params.a=VALUE on",
    ),
    ("model: {target: torch.nn.Identity, params: {a: '${b.c}'}}", "config.yaml: Interpolation key 'b.c' not found"),
]


@pytest.mark.parametrize("text, expected", FILES)
def test_bad_files_get_one_line(text, expected, tmp_path):
    text = complaint(load_config, write(tmp_path, text))
    assert re.search(expected, text) and str(tmp_path) in text, text


@pytest.mark.parametrize(
    "word, expected",
    [
        ("model.params.b.c", "overrides are written key.of.the.file=value"),
        ("--model.x=1", "don't know what to do with '--model.x=1'"),
        ("model.params.a.7=1", "model.params.a.7=1: can't be applied"),
        ("model.params.b=[1", "can't be applied"),
    ],
)
def test_bad_overrides_get_one_line(word, expected, tmp_path):
    assert re.search(expected, complaint(load_config, write(tmp_path, SMALL), [word]))


def test_a_missing_file_is_named(tmp_path):
    assert "none.yaml: can't be read (No such file" in complaint(load_config, tmp_path / "none.yaml")


# ---------------------------------------------------------------- names and building


class Base:
    def __init__(self, width: int, rate: float = 0.1, *, name: str | None = None, on: bool = True):
        self.values = (width, rate, name, on)


class Derived(Base):
    def __init__(self, extra: str = "x", **keywords):
        super().__init__(**keywords)
        self.extra = extra


class Signed(Base):
    __signature__ = __import__("inspect").signature(lambda width, depth=2: None)

    def __init__(self, *args, **keywords):
        self.values = keywords


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(targets, "_REGISTRY", dict(targets._REGISTRY))
    for cls in (Base, Derived, Signed):
        register(f"own.{cls.__name__}", f"{__name__}:{cls.__name__}")


def test_registered_classes_are_built(registered):
    assert resolve("own.Base") is Base and resolve(f"{__name__}.Base") is Base
    built = instantiate({"target": "own.Base", "params": {"width": 2, "rate": 1}}, "x", name="n")
    assert built.values == (2, 1, "n", True)
    assert instantiate({"target": "own.Base", "params": {"width": 5e4}}, "x").values[0] == 50_000
    derived = instantiate({"target": "own.Derived", "params": {"extra": "y", "width": 3}}, "x")
    assert (derived.extra, derived.values[0]) == ("y", 3)
    assert list(parameters(Derived)) == ["width", "rate", "name", "on", "extra"]
    assert list(parameters(Signed)) == ["width", "depth"]
    assert isinstance(instantiate({"target": "torch.nn.Identity"}, "x"), nn.Identity)
    assert isinstance(instantiate({"target": "torch.nn.Identity", "params": None}, "x"), nn.Identity)


def test_register_refuses_what_it_cannot_mean(registered):
    with pytest.raises(ValueError, match="module:attribute"):
        register("own.Other", "os.system")
    with pytest.raises(ValueError, match="already"):
        register("ldm.models.autoencoder.VQModel", "os:system")
    register("own.Base", f"{__name__}:Base")  # the same once more
    register("own.Gone", "no_such_module:Thing")
    assert "no_such_module:Thing can't be imported" in complaint(resolve, "own.Gone")


@pytest.mark.parametrize(
    "theirs, ours",
    {
        "ldm.models.autoencoder.AutoencoderKL": "latent_mt.first_stage.first_stages.AutoencoderKL",
        "ldm.models.autoencoder.VQModelInterface": "latent_mt.VQModelInterface",
        "ldm.modules.encoders.modules.ClassEmbedder": "latent_mt.conditioners.ClassEmbedder",
        "ldm.models.diffusion.ddpm.LatentDiffusion": "latent_mt.model.latent_diffusion.LatentMTDiffusion",
    }.items(),
)
def test_our_names_and_ldms_mean_the_same(theirs, ours):
    assert resolve(theirs) is resolve(ours)


@pytest.mark.parametrize("former", targets._FORMER)
def test_names_of_older_runs_go_on_resolving(former):
    home = targets._FORMER[former]
    attributes = {own.partition(":")[2] for own in targets._REGISTRY.values() if own.startswith(f"{home}:")}
    assert attributes
    for attribute in attributes:
        assert resolve(f"{former}.{attribute}") is resolve(f"{home}.{attribute}")


BUILDING = [
    ({"target": "own.Bass"}, r"where: unknown target 'own.Bass' \(did you mean own.Base\?\)"),
    ({"target": "own.Base", "params": {"widht": 2}}, r"where.params: unknown key 'widht' \(did you mean width\?\)"),
    ({"target": "own.Derived", "params": {"raet": 2}}, r"where.params: unknown key 'raet' \(did you mean rate\?\)"),
    ({"target": "own.Signed", "params": {"dept": 2}}, r"where.params: unknown key 'dept' \(did you mean depth\?\)"),
    ({"target": "own.Base", "parms": {}}, r"where: unknown key 'parms' \(did you mean params\?\)"),
    ({"target": "own.Base"}, r"where.params: lacks width of own.Base"),
    ({"target": "own.Base", "params": {"width": "wide"}}, "where.params.width takes a whole number, not 'wide'"),
    ({"target": "own.Base", "params": {"width": 2.5}}, "takes a whole number, not '2.5'"),
    ({"target": "own.Base", "params": {"width": True}}, "takes a whole number, not 'True'"),
    ({"target": "own.Base", "params": {"width": None}}, "takes a whole number, not 'None'"),
    ({"target": "own.Base", "params": {"width": 1, "rate": "1e"}}, "where.params.rate takes a number, not '1e'"),
    ({"target": "own.Base", "params": {"width": 1, "on": 1}}, "where.params.on takes true or false, not '1'"),
    ({"target": "own.Base", "params": {"width": 1, "given": 1}}, "unknown key 'given'"),
    ({"target": "own.Base", "params": [1]}, "'params' must hold 'key: value' lines"),
    ({"params": {}}, "where: has no target"),
    ("__is_first_stage__", "'__is_first_stage__' belongs in cond_stage_config only"),
    (None, "'None' is no configuration"),
    ({"target": "builtins.eval", "params": {"source": "1"}}, "unknown target 'builtins.eval'"),
]


@pytest.mark.parametrize("config, expected", BUILDING)
def test_what_cannot_be_built_gets_one_line(config, expected, registered):
    assert re.search(expected, complaint(instantiate, config, "where"))


def test_what_the_program_sets_cannot_be_set_in_the_file(registered):
    config = {"target": "own.Base", "params": {"width": 1, "name": "mine"}}
    assert "where.params.name: is set by the program" in complaint(instantiate, config, "where", name="its")


def test_unknown_keys_of_nested_configurations_name_their_place():
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"model_chanels": 32}}
    text = complaint(instantiate, unet, "model.params.unet_config")
    assert "model.params.unet_config.params: unknown key 'model_chanels' (did you mean model_channels?)" in text


def test_check_shape_takes_plain_dictionaries():
    check_shape(SMALL)
    assert "the configuration: unknown key 'modle'" in complaint(check_shape, {"modle": {}})


# ---------------------------------------------------------------- Lightning's Trainer


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"benchmark": True, "accumulate_grad_batches": 2}, {"benchmark": True, "accumulate_grad_batches": 2}),
        ({"gpus": 2}, {"accelerator": "gpu", "devices": 2}),
        ({"gpus": "0,"}, {"accelerator": "gpu", "devices": [0]}),
        ({"gpus": "0,3"}, {"accelerator": "gpu", "devices": [0, 3]}),
        ({"gpus": [1, 2]}, {"accelerator": "gpu", "devices": [1, 2]}),
        ({"gpus": -1, "accelerator": "ddp"}, {"accelerator": "gpu", "devices": -1, "strategy": "ddp"}),
        ({"gpus": 0}, {"accelerator": "cpu"}),
        ({"num_processes": 3, "distributed_backend": "ddp"}, {"devices": 3, "strategy": "ddp"}),
        ({"accelerator": "cpu", "devices": 1, "precision": 16}, {"accelerator": "cpu", "devices": 1, "precision": 16}),
        ({"terminate_on_nan": True}, {"detect_anomaly": True}),
        ({}, {}),
    ],
)
def test_trainer_options_of_lightning_1_are_translated(given, expected):
    assert trainer_options({"lightning": {"trainer": given}}) == expected
    assert trainer_options({}) == {} and trainer_options({"lightning": None}) == {}


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"benchmrk": True}, r"lightning.trainer: unknown key 'benchmrk' \(did you mean benchmark\?\)"),
        ({"max_steps": 5}, "lightning.trainer.max_steps: is set by the run; write run.total_steps instead"),
        ({"resume_from_checkpoint": "x"}, "the same command again resumes"),
        ({"gradient_clip_val": 1.0}, "write run.grad_clip"),
        ({"accelerator": "dp"}, "Lightning no longer has 'dp'; write strategy: ddp"),
        ({"distributed_backend": "horovod"}, "no longer has 'horovod'"),
        ({"auto_lr_find": True}, "Lightning no longer has it; set model.base_learning_rate"),
        ({"gpus": "all"}, "lightning.trainer.gpus: 'all' is no number of devices"),
        ({"gpus": 2, "devices": 3}, "lightning.trainer.devices: contradicts devices: 2"),
        ({"gpus": 2, "accelerator": "cpu"}, "contradicts accelerator: gpu"),
    ],
)
def test_other_trainer_options_are_refused_by_name(given, expected):
    assert re.search(expected, complaint(trainer_options, {"lightning": {"trainer": given}}))


def test_every_translated_option_is_one_that_lightning_has():
    from pytorch_lightning import Trainer

    names = set(__import__("inspect").signature(Trainer.__init__).parameters)
    assert set(trainer_options_of._RENAMED.values()) <= names
    assert not set(trainer_options_of._GONE) & names and not set(trainer_options_of._GONE) & set(
        trainer_options_of._OF_THE_RUN
    )
    Trainer(**trainer_options({"lightning": {"trainer": {"accelerator": "cpu", "benchmark": True}}}), logger=False)


# ---------------------------------------------------------------- learning-rate factors


def test_warm_up_and_cosine():
    rate = lr_scheduler.LambdaWarmUpCosineScheduler(
        warm_up_steps=10, lr_min=0.1, lr_max=1.0, lr_start=0.01, max_decay_steps=110
    )
    assert rate(0) == rate.schedule(0) == 0.01
    assert rate(5) == pytest.approx(0.01 + 0.99 / 2)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.55)
    assert rate(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rate(110) == rate(10**6) == pytest.approx(0.1)


def test_cycles():
    lists = {
        "warm_up_steps": [10, 4],
        "f_min": [0.1, 0.2],
        "f_max": [1.0, 0.5],
        "f_start": [0.0, 0.1],
        "cycle_lengths": [20, 8],
    }
    cosine, line = lr_scheduler.LambdaWarmUpCosineScheduler2(**lists), lr_scheduler.LambdaLinearScheduler(**lists)
    for rate in (cosine, line):
        assert rate(5) == pytest.approx(0.5)
        assert rate(20) == pytest.approx(0.1)  # the end of the first cycle
        assert rate(22) == pytest.approx(0.1 + 0.4 / 2)
    assert cosine(15) == pytest.approx(0.55) and cosine(28) == cosine(500) == pytest.approx(0.2)
    assert line(15) == pytest.approx(0.1 + 0.9 * 5 / 20) and line(28) == pytest.approx(0.2)
    assert "cycle_lengths must be a list with one entry per cycle" in complaint(
        lr_scheduler.LambdaLinearScheduler, **{**lists, "cycle_lengths": [20]}
    )


def test_ldms_schedules_are_built_and_constant_after_the_warm_up():
    config = CONFIGS["ldm/lsun_churches256"]["model"]["params"]["scheduler_config"]
    rate = instantiate(config, "scheduler_config")
    assert rate.schedule(0) == 1e-6 and rate.schedule(5000) == pytest.approx(0.5, abs=1e-3)
    assert rate.schedule(10_000) == rate.schedule(500_000) == 1.0


def test_another_target_starts_with_empty_params(tmp_path):
    """So that one of LDM's files can be given data of ours on the command line."""
    path = write(tmp_path, CONFIGS["ldm/celeba256"] if "ldm/celeba256" in CONFIGS else next(iter(CONFIGS.values())))
    own = ["data.target=latent_mt.data.ImageData", "data.params.path=faces", "data.params.batch_size=8"]
    config = load_config(path, own)
    assert config["data"] == {"target": "latent_mt.data.ImageData", "params": {"path": "faces", "batch_size": 8}}
    again = load_config(path, [*own, "data.target=latent_mt.data.ImageData"])  # the same class again keeps them
    assert again["data"] == config["data"]


@pytest.mark.parametrize(
    "name",
    [
        "LatentInpaintDiffusion",
        "LatentDepth2ImageDiffusion",
        "LatentUpscaleDiffusion",
        "ImageEmbeddingConditionedLatentDiffusion",
    ],
)
def test_stable_diffusions_other_models_are_named_first(name, tmp_path):
    """Not the keys, encoders and data that only they have."""
    file = tmp_path / "sd.yaml"
    file.write_text(f"""
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.{name}
  params:
    depth_stage_config: {{target: ldm.modules.midas.api.MiDaSInference}}
    embedder_config: {{target: ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder}}
    low_scale_config: {{target: ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation}}
    cond_stage_config: {{target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder}}
data: {{target: ldm.data.laion.WebDataModuleFromConfig}}
""")
    with pytest.raises(
        UserError, match=rf"model: ldm.models.diffusion.ddpm.{name} is not built: its network also takes"
    ):
        load_config(file)
