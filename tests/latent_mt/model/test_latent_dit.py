"""A diffusion transformer on latents: forms U, X and any from released weights, learned variances, classes, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny import assert_same, contents, step_folder, words
from tiny_dit import CLASSES, params_of, random_dit, write_released
from tiny_latent import (
    FIRST_STAGE,
    LATENT,
    SIZE,
    random_model,
    train,
    write_images,
    write_run,
)
from torch import Tensor

from guided_mt.data import Batch
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from latent_mt.commands import latent_classify, latent_restore, latent_sample
from latent_mt.model.conditions import class_condition
from latent_mt.model.generate import preview_grid
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.runs.targets import instantiate


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


# ---------------------------------------------------------------- forms U, X and any from released weights

LABEL = {"label": {"num_classes": 3}}
FORMS: dict[str, dict[str, Any]] = {
    "masked": {"mt_tasks": {"masked": {}}},
    "label": {"mt_tasks": LABEL, "cond_stage_key": "image"},
    "pair": {"mt_sides": ["day", "night"], "mt_swap_prob": 0.5, "cond_stage_key": "image", "network": {"num_classes": None}},
    "several": {"mt_tasks": {"masked": {}, "captions": {"task": "caption", "caption_vocabulary": "bpe"}}},
    "label beside": {"mt_tasks": {"masked": {}, **LABEL}, "cond_stage_key": "image"},
}  # fmt: skip


@pytest.mark.parametrize("variant", ["U", "X", "any"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_from_released_weights_the_output_is_the_released_one_to_the_bit(released, form, variant):
    """Whatever is given, before training: the class' own output where it is told one, else the null class'."""
    what = {"mt_variant": variant, "mt_drop_prob": 0.0, **FORMS[form]}
    torch.manual_seed(1)
    model = LatentMTDiffusion(**params_of(**what, ckpt_path=str(released / "dit.pt"))).eval()
    z, t = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 900])
    y = torch.tensor([1, 2]) if model.classes_told else None
    expected = random_dit()(z, t, torch.full((2,), CLASSES) if y is None else y)
    given = {name: modality.prior(model.shape, SampleStreams(t)) for name, modality in model.modalities.items()}
    given |= {"captions": torch.tensor([[5, 6, *[0] * 75]] * 2)} if "captions" in given else {}
    role = {"y": torch.tensor([0, 1])} if model.roles.told else {} if y is None else {"y": y}
    for shown in ({}, given) if variant != "U" else ({},):
        assert torch.equal(model.model(z, t, shown, **role).output, expected)


def test_in_context_tokens_change_the_output_before_training(released):
    """They stand in the sequence, so that attention sees them: no initial weights undo that."""
    what = {"mt_tasks": LABEL, "cond_stage_key": "image", "mt_variant": "any", "mt_drop_prob": 0.0}
    model = LatentMTDiffusion(
        **params_of(**what, network={"context": "in-context"}, ckpt_path=str(released / "dit.pt"))
    ).eval()
    z, t = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 900])
    with torch.no_grad():
        found = model.model(z, t, {"label": torch.tensor([0, 1])}).output
        assert not torch.allclose(found, random_dit()(z, t, torch.full((2,), CLASSES)))


# ---------------------------------------------------------------- training


def batch(labels: Tensor | None = None) -> Batch:
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, labels, torch.arange(4), torch.arange(4))


def test_training_adds_the_bound_of_learned_variances():
    """ADM's hybrid loss: mse + vb, where the bound teaches the variances alone."""
    model = random_model(**params_of())
    assert model.terms == ["mse", "vb"]
    losses, _ = model.losses(batch(torch.tensor([0, 1, 2, 3])), SampleStreams(0, torch.arange(4)))
    torch.testing.assert_close(losses.loss, losses.terms["mse"] + losses.terms["vb"])
    (of_mse,) = torch.autograd.grad(losses.terms["mse"].sum(), model.network.final_layer.linear.bias, retain_graph=True)
    (of_vb,) = torch.autograd.grad(losses.terms["vb"].sum(), model.network.final_layer.linear.bias)
    assert not of_mse.view(4, 8)[:, 4:].any() and of_mse.view(4, 8)[:, :4].any()
    assert not of_vb.view(4, 8)[:, :4].any() and of_vb.view(4, 8)[:, 4:].any()
    plain = random_model(**params_of(network={"learn_sigma": False}))
    assert plain.terms == ["mse"] and plain.network.out_channels == 4


def test_classes_are_told_where_the_condition_is_the_class():
    """And else each image is seen as the null class."""
    seen: list[Tensor] = []

    def losses_of(model: LatentMTDiffusion, labels: Tensor | None) -> None:
        model.network.y_embedder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
        model.losses(batch(labels), SampleStreams(0, torch.arange(4)))

    labels = torch.tensor([0, 1, 2, 4])
    losses_of(random_model(**params_of(mt_drop_prob=0.0)), labels)
    assert seen.pop().tolist() == labels.tolist() and not seen
    losses_of(random_model(**params_of(mt_drop_prob=1.0)), labels)
    assert seen.pop().tolist() == [-1] * 4
    told_none = random_model(**params_of(cond_stage_key="image", mt_drop_prob=0.0))
    losses_of(told_none, None)
    assert seen.pop().tolist() == [-1] * 4 and told_none.classes_told == 0
    assert class_condition(told_none, [0, 1], -1) == {}
    with pytest.raises(UserError, match="--class_id 1: this model is told no classes"):
        class_condition(told_none, [0, 1], 1)
    assert preview_grid(told_none, None) is not None


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"mt_tasks": LABEL}, "cond_stage_key class_label tells the network the class that mt_tasks.label is to predict"),
        ({"mt_sides": ["day", "night"], "mt_swap_prob": 0.5}, "num_classes: taken by mt_swap_prob, .*; write null"),
        ({"network": {"size": "M/2"}}, "unet_config: size M/2: choose from S/2"),
        ({"network": {"num_heads": 5}}, "unet_config: hidden_size 32 is not a multiple of num_heads 5"),
        ({"network": {"context": "both"}}, "unet_config: context 'both' is none of cross, in-context"),
        ({"network": {"precision": "fp8"}}, "unet_config: precision 'fp8' is none of"),
        ({"network": {"num_classes": 0}}, "num_classes 0: write how many, or null"),
        ({"network": {"heads": 2}}, "unknown key 'heads'"),
        ({"network": {"in_channels": 8}}, "in_channels 8 and out_channels 8 don't fit latents of 4 channels"),
        ({"mt_routing": "dtr"}, "has no channels that can be routed"),
    ],
)  # fmt: skip
def test_bad_settings_are_told(params, expected):
    with pytest.raises(UserError, match=expected):
        instantiate({"target": "latent_mt.LatentMTDiffusion", "params": params_of(**params)}, "model")


DATA = {"image_size": SIZE, "batch_size": 4, "num_workers": 0}


def write_class_run(folder: Path, name: str, released: Path | None, **values: Any) -> Path:
    images = folder / "images"
    if not images.exists():
        write_images(images)
    start = {} if released is None else {"ckpt_path": str(released / "dit.pt")}
    stage = {**FIRST_STAGE, "params": {**FIRST_STAGE["params"], "ckpt_path": str((released or folder) / "vae")}}
    params = params_of(**start, **({} if released is None else {"first_stage_config": stage}), **values)
    config = {
        "model": {"learning_rate": 1e-3, "target": "latent_mt.LatentMTDiffusion", "params": params},
        "data": {"target": "latent_mt.data.ImageData", "params": {**DATA, "path": str(images)}},
        "lightning": {"trainer": {"accelerator": "cpu"}},
        "run": {"log_dir": str(folder / name), "total_steps": 4, "log_interval": 1, "save_interval": 2, "ema_rate": "0.9"},
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return file


def test_a_class_conditional_run_from_released_weights(released, tmp_path, capsys):
    """Trained, stopped and gone on with: the same run to the bit; drawn with guidance by its averages."""
    train(write_class_run(tmp_path, "whole", released, network={"use_checkpoint": True}), "run.sample_interval=4")
    stopped = write_class_run(tmp_path, "stopped", released, network={"use_checkpoint": True})
    train(stopped, "run.total_steps=2")
    train(stopped)
    one, two = (contents(step_folder(tmp_path / name, 4)) for name in ("whole", "stopped"))
    del one["config.yaml"], two["config.yaml"]  # they name their own folders
    assert_same(one, two)
    rows = (tmp_path / "whole" / "progress.csv").read_text().splitlines()
    assert {"mse", "vb"} <= set(rows[0].split(",")) and len(rows) == 5
    flags = {"num_samples": 2, "timestep_respacing": 3, "guidance_scale": 2, "class_id": 1, "device": "cpu"}
    latent_sample.main(words(model_path=tmp_path / "whole", out=tmp_path / "drawn", **flags))
    assert len(list((tmp_path / "drawn").glob("*.npz"))) == 1
    with pytest.raises(UserError, match=r"--first_stage .*: the file of --model_path holds its own"):
        latent_sample.main(
            words(model_path=tmp_path / "whole", out=tmp_path / "x", first_stage=released / "vae", **flags)
        )


def test_what_a_run_says_of_its_null_class(released, tmp_path, capsys):
    for name, values, expected in (
        ("told", {"mt_drop_prob": 0.0}, "mt_drop_prob 0: the null class is never trained"),
        ("untold", {"cond_stage_key": "image"}, f"knows {CLASSES} classes and is told none"),
    ):
        train(write_class_run(tmp_path, name, None, **values), "run.total_steps=1", "run.save_interval=1")
        assert expected in capsys.readouterr().out
    with pytest.raises(UserError, match="num_classes 2: the data have 3 classes; raise it"):
        train(write_class_run(tmp_path, "few", None, network={"num_classes": 2}))


def test_a_network_with_a_null_class_restores_and_classifies(tmp_path):
    """The commands that tell no class leave the null class to the network."""
    images = write_images(tmp_path / "images")
    run = write_run(tmp_path / "run", images, **params_of(**FORMS["label beside"], mt_variant="any"))
    common = {"model_path": run, "data_dir": images, "num_samples": 2, "device": "cpu"}
    latent_restore.main(words(**common, mask="patches:3", steps=2, out=tmp_path / "restored.npz"))
    latent_classify.main(words(**common, draws=1, out=tmp_path / "classes.npz"))
    with np.load(tmp_path / "restored.npz") as restored:
        assert restored["arr_0"].shape == (2, SIZE, SIZE, 3)
    assert (tmp_path / "classes.npz").exists()
