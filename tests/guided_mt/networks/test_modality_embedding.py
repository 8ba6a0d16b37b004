"""--mt_embedding: a learned vector says whose the tokens are. At zero it says nothing; then it enters like any token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same, column, contents, flags, progress, step_folder

from guided_mt.commands import train
from guided_mt.errors import UserError
from guided_mt.generation.build import build_model, run_sections
from guided_mt.networks.multi_task import MultiTask
from guided_mt.runs.checkpoint import is_own, load_weights
from guided_mt.runs.config import parse

KEY = "modality_embedding.label"
BACKBONES = ["unet", "dit"]


def network(**values: Any) -> MultiTask:
    """Of random weights everywhere but in the vectors, which are zero at first."""
    settings = {"mt_task": "masked,label", "mt_variant": "any", "num_classes": 10, **values}
    torch.manual_seed(0)
    model = build_model(parse(flags(**settings), run_sections(), description=""))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != KEY:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def run_of(folder: Path, steps: int, **values: Any) -> Path:
    settings = {"mt_task": "label", "mt_variant": "any", "num_classes": 10, "ema_rate": "0.5", "lr": 1e-2}
    train.main(flags(**{**settings, "total_steps": steps, "save_interval": 2, "log_dir": folder, **values}))
    return folder


@pytest.mark.parametrize("backbone", BACKBONES)
def test_zero_vectors_change_nothing_and_others_do(backbone):
    plain, model = network(mt_backbone=backbone), network(mt_backbone=backbone, mt_embedding=True)
    z, t, ids = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), torch.tensor([1, 2])
    given = {"label": torch.tensor([True, False])}

    def output(network, **options):
        return network(z, t, {"label": ids}, given=given, **options).output

    assert set(model.state_dict()) - set(plain.state_dict()) == {KEY} and is_own(KEY)
    assert not model.modality_embedding["label"].any()
    assert torch.equal(output(model), output(plain))
    before, unseen = output(model), output(model, unconditional=True)
    output(model).square().sum().backward()
    assert model.modality_embedding["label"].grad.abs().max() > 0
    with torch.no_grad():
        model.modality_embedding["label"].normal_()
        assert not torch.allclose(output(model), before)
        torch.testing.assert_close(output(model, unconditional=True), unseen)  # no token, no vector
        # A vector is the same as one that is added to the token and to the null token by hand.
        plain.null_token["label"].add_(model.modality_embedding["label"])
        tokens = plain.context_in["label"]
        plain.context_in["label"] = _Shifted(tokens, model.modality_embedding["label"])
        torch.testing.assert_close(output(plain), output(model))


class _Shifted(torch.nn.Module):
    def __init__(self, tokens: torch.nn.Module, by: torch.Tensor):
        super().__init__()
        self.tokens, self.by = tokens, by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x) + self.by


def test_a_run_learns_them_goes_on_and_starts_from_one_without(tmp_path):
    plain = run_of(tmp_path / "plain", 2)
    whole = run_of(tmp_path / "whole", 4, mt_embedding=True)
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    shutil.rmtree(step_folder(halves, 4))
    run_of(halves, 4, mt_embedding=True)
    expected, found = contents(step_folder(whole, 4)), contents(step_folder(halves, 4))
    assert_same(expected["model.safetensors"], found["model.safetensors"])
    assert progress(whole) == progress(halves)
    assert found["model.safetensors"][KEY].any()
    assert column(whole, "loss")[0] == column(plain, "loss")[0]

    model = network(mt_task="label", mt_embedding=True)
    file = step_folder(plain, 2) / "model.safetensors"
    assert load_weights(model, file, allow_new=True) == [KEY] and not model.modality_embedding["label"].any()
    with pytest.raises(UserError, match=r"mt_embedding \(False there, True here\)"):
        run_of(plain, 4, mt_embedding=True)


def test_a_model_that_never_sees_a_modality_does_not_train_its_vector(tmp_path):
    run = run_of(tmp_path, 2, mt_embedding=True, mt_drop_prob=1)
    assert not contents(step_folder(run, 2))["model.safetensors"][KEY].any()


def test_images_have_no_tokens(tmp_path):
    with pytest.raises(UserError, match=r"--mt_embedding True: nothing of --mt_task masked enters as tokens"):
        run_of(tmp_path, 2, mt_task="masked", mt_embedding=True)
