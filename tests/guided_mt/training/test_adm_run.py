"""Going on with a run folder of ADM's own code, as its train_util.py does: step by the name, averages, optimiser."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import adm_unet, flags, step_folder, words

from guided_mt.commands import sample, train
from guided_mt.errors import UserError

STEP = 30


def write_run(folder, fp16: bool = False):
    """model, two averages and the optimiser of step 30, as ADM writes them. Returns (network, moments by name)."""
    folder.mkdir()
    torch.manual_seed(1)
    unet = adm_unet()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    state = unet.state_dict()
    torch.save(state, folder / f"model{STEP:06d}.pt")
    for rate, offset in (("0.9", 1.0), ("0.99", 2.0)):
        torch.save({key: value + offset for key, value in state.items()}, folder / f"ema_{rate}_{STEP:06d}.pt")
    named = dict(unet.named_parameters())
    moments = {name: (torch.randn_like(p), torch.rand_like(p)) for name, p in named.items()}
    masters, groups = list(named.values()), [[name] for name in named]
    if fp16:  # fp16_util.make_master_params: all vectors in one tensor, all others in another
        groups = [[n for n, p in named.items() if p.ndim <= 1], [n for n, p in named.items() if p.ndim > 1]]
        masters = [torch.cat([named[n].detach().flatten() for n in group]) for group in groups]
        masters = [torch.nn.Parameter(m.view(shape)) for m, shape in zip(masters, ((-1,), (1, -1)), strict=True)]
    adam = torch.optim.AdamW(masters, lr=1e-4)
    for master, group in zip(masters, groups, strict=True):
        first, second = (torch.cat([moments[n][k].flatten() for n in group]).view_as(master) for k in (0, 1))
        adam.state[master] = {"step": STEP, "exp_avg": first, "exp_avg_sq": second}
    torch.save(adam.state_dict(), folder / f"opt{STEP:06d}.pt")
    return unet, moments


def argv(folder, run, **values):
    return flags(mt_task="none", resume_checkpoint=folder / f"model{STEP:06d}.pt", log_dir=run, **values)


@pytest.mark.parametrize("fp16", [False, True])
def test_step_averages_and_optimiser_are_adms(fp16, tmp_path, caplog):
    unet, moments = write_run(tmp_path / "adm", fp16)
    with caplog.at_level("INFO"):
        train.main(argv(tmp_path / "adm", tmp_path / "run", total_steps=STEP + 1, ema_rate="0.9,0.5", lr=0.0))
    (said,) = [record.getMessage() for record in caplog.records if "going on" in record.getMessage()]
    assert "step 30 of a run of guided-diffusion, ema_0.9_000030.pt, averages of rate 0.5 from the weights" in said
    assert said.endswith("opt000030.pt")
    folder = step_folder(tmp_path / "run", STEP + 1)
    state = torch.load(folder / "training_state.pt", weights_only=True)["optimizer"]["adamw"]["state"]
    weights, average, fresh = (load_file(folder / f"{stem}.safetensors") for stem in ("model", "ema_0.9", "ema_0.5"))
    for k, (name, value) in enumerate(unet.named_parameters()):
        assert torch.equal(weights[name], value)  # at a rate of 0
        assert torch.allclose(average[name], value + 0.9, atol=1e-5) and torch.allclose(fresh[name], value, atol=1e-6)
        assert float(state[k]["step"]) == STEP + 1
        gradient = (state[k]["exp_avg"] - 0.9 * moments[name][0]) / 0.1
        expected = 0.999 * moments[name][1] + 0.001 * gradient**2
        assert torch.allclose(state[k]["exp_avg_sq"], expected, rtol=1e-3, atol=1e-4), name


def test_what_does_not_fit_is_said(tmp_path):
    write_run(tmp_path / "adm")
    with pytest.raises(UserError, match="has done 30 steps, so --total_steps 5 leaves nothing to do"):
        train.main(argv(tmp_path / "adm", tmp_path / "run", total_steps=5))
    file = tmp_path / "adm" / f"opt{STEP:06d}.pt"
    state = torch.load(file, weights_only=True)
    del state["state"][0]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"opt000030.pt: is no optimiser's state of this network"):
        train.main(argv(tmp_path / "adm", tmp_path / "run", total_steps=STEP + 1))


def test_other_networks_and_lonely_files_begin_a_new_run(tmp_path, caplog):
    folder = tmp_path / "adm"
    write_run(folder)
    with caplog.at_level("INFO"):
        train.main([*argv(folder, tmp_path / "mt", total_steps=1), "--mt_task", "masked"])
    assert any("a new run begins, and what lies beside the file stays unread" in r.getMessage() for r in caplog.records)
    assert step_folder(tmp_path / "mt", 1).exists()
    for file in [*folder.glob("ema_*"), *folder.glob("opt*")]:
        file.unlink()
    with caplog.at_level("INFO"):
        train.main(argv(folder, tmp_path / "alone", total_steps=1))
    assert any(
        "no optimiser of guided-diffusion lie beside it: a new run begins" in r.getMessage() for r in caplog.records
    )
    assert step_folder(tmp_path / "alone", 1).exists()
    sample.main(words(model_path=tmp_path / "alone", num_samples=1, steps=1, device="cpu"))
