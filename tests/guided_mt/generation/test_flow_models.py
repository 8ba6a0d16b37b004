"""Flow models by the commands, on each backbone; a network of SiT's or REPA's conventions is ours by two rows and a flag."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_same, column, contents, flags, step_folder, words

from guided_mt.commands import classify, export, nll, restore, sample, train
from guided_mt.diffusion.network import TIMES, as_told
from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.diffusion.sampling import sample as draw
from guided_mt.errors import UserError
from guided_mt.generation.build import build_diffusion, build_model, run_sections, saved_config
from guided_mt.runs.backbones import BACKBONES
from guided_mt.runs.config import Config, parse

FLOW = {"noise_schedule": "straight", "prediction": "velocity", "learn_sigma": False}
MODALITIES = {"mt_task": "masked,label", "num_classes": 10, "mt_label_head": "E"}


def configuration(**values: Any) -> Config:
    return parse(flags(**{**FLOW, **values}), run_sections(), description="")


def random_model(config: Config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("time", [name for name in TIMES if name != "steps"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_backbone_is_told_time_and_state_and_nothing_else_is(backbone, time):
    """The same weights, shown the straight path at its time: the output is that of the plain network there. Modalities that it is
    given are shown as they are, and its heads see z_t and t as ever."""
    config = configuration(**MODALITIES, mt_backbone=backbone, mt_variant="X", mt_time=time)
    model = random_model(config)
    plain = copy.deepcopy(model)
    plain.told, plain.heads = None, torch.nn.ModuleDict()
    assert (
        model.state_dict().keys()
        == random_model(configuration(**MODALITIES, mt_backbone=backbone, mt_variant="X")).state_dict().keys()
    )
    full, t = build_diffusion(config), torch.tensor([0, 20, 39])
    z_t, x = torch.randn(3, 3, 8, 8), {"masked": torch.randn(3, 3, 8, 8), "label": torch.tensor([1, 2, 3])}
    tau = (t + 1) / full.num_timesteps
    told = {"noise-level": tau, "data-level": 1 - tau, "noise-level-1000": 1000 * tau}[time]
    length = torch.sqrt((1 - tau) ** 2 + tau**2).view(-1, 1, 1, 1)  # from y_t to the straight path
    seen = {}
    model.heads["label"].register_forward_hook(lambda module, args, output: seen.update(args[0]._asdict()))
    with torch.no_grad():
        result, expected = model(z_t, t, x), plain(length * z_t, told, x)
    torch.testing.assert_close(result.output, expected.output, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen["z_t"], z_t) and torch.equal(seen["timesteps"], t)


@pytest.mark.parametrize(
    ("project", "prediction", "time"), [("SiT", "velocity-to-data", "data-level"), ("REPA", "velocity", "noise-level")]
)
def test_networks_of_sit_and_repa(project, prediction, time):
    """SiT: x = t z_0 + (1 - t) eps, the network says dx/dt = z_0 - eps at t in [0, 1], data at 1. REPA: x = (1 - t) z_0 + t eps,
    dx/dt = eps - z_0, data at 0. Euler's rule of either, written out, is our ddim; and its training loss ours."""
    config, steps = configuration(mt_task="none", prediction=prediction, mt_time=time, diffusion_steps=10), 10
    model, full = random_model(config), build_diffusion(config)
    theirs = copy.deepcopy(model)
    theirs.told = None
    x = noise = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for k in range(steps):
            t, step = (k / steps, 1 / steps) if project == "SiT" else (1 - k / steps, -1 / steps)
            x = x + step * theirs(x, torch.full((2,), t)).output
    drawn = draw(model, full, {}, x.shape, sampler="ddim", start=(noise, steps - 1), clip_denoised=False).x_start
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)

    z_0, eps, t = torch.randn(steps, 3, 8, 8), torch.randn(steps, 3, 8, 8), torch.arange(steps)
    tau = ((t + 1) / steps).view(-1, 1, 1, 1)
    velocity, time_of = (z_0 - eps, 1 - tau) if project == "SiT" else (eps - z_0, tau)
    with torch.no_grad():
        said = theirs((1 - tau) * z_0 + tau * eps, time_of.flatten()).output
        ours = full.training_losses(model, z_0, t, noise=eps)["loss"]
    torch.testing.assert_close(ours, (said - velocity).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    wrapped = as_told(lambda z, t: theirs(z, t).output, time, full.alphas_cumprod)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(eps, t, {}).output, model(eps, t).output, rtol=1e-5, atol=1e-6)


def few_steps(run: Path, steps: int, **values: Any) -> Path:
    settings = {**FLOW, "total_steps": steps, "save_interval": 2, "ema_rate": "0.5", "data_workers": 0}
    train.main(flags(**{**settings, **values, "log_dir": run}))
    return run


@pytest.mark.parametrize(("backbone", "time"), [("unet", "steps"), ("unet", "noise-level"), ("dit", "data-level")])
def test_a_flow_model_by_the_commands(backbone, time, tmp_path, capsys):
    """It trains, goes on to the bit, and draws by every sampler, with a modality unknown, given, and restored."""
    settings = {"mt_task": "label", "num_classes": 10, "mt_drop_prob": 0.2, "mt_backbone": backbone, "mt_time": time}
    whole = few_steps(tmp_path / "whole", 4, **settings)
    few_steps(tmp_path / "halves", 2, **settings)
    halves = few_steps(tmp_path / "halves", 4, **settings)
    assert np.isfinite(column(whole, "loss")).all() and column(whole, "loss")[0] > 0.5
    expected, found = contents(step_folder(whole, 4)), contents(step_folder(halves, 4))
    for one in (expected, found):
        del one["config.yaml"]
    assert_same(expected, found)
    for sampler in SAMPLERS:
        for more in ({}, {"given": "label=3"}, {"guidance_scale": 2, "given": "label=3"}):
            out = tmp_path / "drawn.npz"
            options = {"sampler": sampler, "num_samples": 2, "steps": 4, "out": out, "device": "cpu", **more}
            if "guidance_scale" in more and sampler != "ddim":
                continue
            sample.main(words(model_path=whole, **options))
            with np.load(out) as drawn:
                assert drawn["arr_0"].shape == (2, 8, 8, 3)
    exported = words(model_path=whole, out=tmp_path / "adm.pt")
    if backbone == "dit":  # there is code that samples from such a transformer, and it is said that DiT's own does not
        export.main(exported)
        said = (
            "mt_time data-level, noise_schedule straight, prediction velocity: DiT's own code would draw something else"
        )
        assert said in capsys.readouterr().out
        return
    with pytest.raises(
        UserError, match=r"trained with --(mt_time|noise_schedule) .*guided-diffusion's code does not have"
    ):
        export.main(exported)


def test_the_other_commands_on_a_flow_model(tmp_path, capsys):
    """Likelihood, restoration and classification."""
    run = few_steps(tmp_path / "run", 2, mt_task="masked,label", mt_variant="U", num_classes=10, mt_drop_prob=0.1)
    data = {"data_dir": "builtin:digits", "device": "cpu"}
    nll.main(words(model_path=run, num_samples=2, batch_size=2, **data))
    (bits,) = re.findall(r"^total_bpd +(\S+) ", capsys.readouterr().out, re.MULTILINE)
    assert np.isfinite(float(bits))
    for method in ("mt", "repaint"):
        restore.main(
            words(model_path=run, num_samples=2, steps=3, out=tmp_path / f"{method}.npz", method=method, **data)
        )
    classify.main(words(model_path=run, num_samples=4, **data))


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--rescale_timesteps True scales the timesteps, which --mt_time data-level"):
        build_model(configuration(mt_time="data-level", rescale_timesteps=True))
    with pytest.raises(UserError, match="let the network predict velocity, v or x0"):
        build_diffusion(configuration(prediction="eps"))
    with pytest.raises(UserError, match=r"--mt_time: 'data' is none of steps, noise-level, data-level"):
        configuration(mt_time="data")


def test_a_run_from_before_flow_models(tmp_path):
    run = few_steps(tmp_path / "run", 1, noise_schedule="cosine", prediction="eps")
    file = step_folder(run, 1) / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("mt_time:")))
    assert saved_config(step_folder(run, 1) / "model.safetensors")["mt_time"] == "steps"
