"""First stages: LDM's names and numbers, the codebook, and what they say of bad input."""

from __future__ import annotations

import gzip
import json
import logging
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import save_file
from test_unet import fill
from torch import Tensor

from guided_mt.errors import UserError
from latent_mt.first_stage.first_stages import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from latent_mt.first_stage.layers import AttnBlock, Downsample
from latent_mt.first_stage.posterior import DiagonalGaussian
from latent_mt.first_stage.quantize import VectorQuantizer, codebook_usage

RELEASED = json.loads(gzip.decompress((GOLDEN / "ldm_first_stage_keys.json.gz").read_bytes()))
CLASSES = {"ldm.models.autoencoder.AutoencoderKL": AutoencoderKL, "ldm.models.autoencoder.VQModel": VQModel}
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
VQ_DDCONFIG = {**DDCONFIG, "double_z": False}


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    arrays = np.load(GOLDEN / f"{name}.npz")
    return json.loads((GOLDEN / f"{name}.json").read_text()), {k: torch.from_numpy(arrays[k]) for k in arrays.files}


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-4


def assert_same_image(a: Tensor, b: Tensor) -> None:
    """To 1e-4 of the largest value, which is 20: the golden reconstruction's own distance from the exact decoder (float64) is
    2.2e-5 and 2.7e-5 of that, float32 rounding through all layers. Another eps of the group norms would give 1e-3 to 5e-3."""
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-4 * b.abs().max()


def complaint(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


# ---------------------------------------------------------------- LDM's numbers and names


@torch.no_grad()
def test_kl_golden():
    spec, arrays = golden("ldm_autoencoder_kl")
    model = AutoencoderKL(**spec["constructor"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["parameter_shapes"]
    fill(model, spec["fill_seed"]).eval()
    mean, logvar = model.encode_moments(arrays["x"])
    assert_close(mean, arrays["mean"])
    assert_close(logvar, arrays["logvar"])
    assert_close(model.encode(arrays["x"]).kl(), arrays["kl"])
    assert_same_image(model.decode(arrays["mean"]), arrays["reconstruction"])
    assert_same_image(model(arrays["x"], sample_posterior=False)[0], arrays["reconstruction"])
    exact = model.double().decode(arrays["mean"].double())
    assert (exact - arrays["reconstruction"]).abs().mean() <= 1e-4


@torch.no_grad()
def test_vq_golden():
    spec, arrays = golden("ldm_autoencoder_vq")
    model = VQModel(**spec["constructor"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["parameter_shapes"]
    fill(model, spec["fill_seed"]).eval()
    pre_quant, logvar = model.encode_moments(arrays["x"])
    assert logvar is None
    assert_close(pre_quant, arrays["pre_quant"])
    quant, emb_loss, indices = model.encode(arrays["x"])
    assert_close(quant, arrays["quant"])
    assert_close(emb_loss, arrays["emb_loss"].view(()))
    assert torch.equal(indices.view(2, -1), arrays["indices"])
    assert_same_image(model.decode(quant), arrays["reconstruction"])
    assert_same_image(model.decode_code(indices.view(2, 16, 16)), arrays["reconstruction"])

    interface = VQModelInterface(**spec["constructor"])
    interface.load_state_dict(model.state_dict())
    assert_close(interface.encode(arrays["x"]), arrays["pre_quant"])
    assert_same_image(interface.decode(arrays["pre_quant"]), arrays["reconstruction"])
    assert_same_image(interface.decode(arrays["quant"], force_not_quantize=True), arrays["reconstruction"])


@pytest.mark.parametrize("name", RELEASED)
def test_released_keys(name):
    with torch.device("meta"):
        model = CLASSES[RELEASED[name]["target"]](**RELEASED[name]["params"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == RELEASED[name]["state_dict"]
    assert model.downsampling == int(name.split("-")[1][1:])


def test_attention_is_explicit_softmax_attention():
    block = fill(AttnBlock(32), seed=1).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    q, k, v = (part(block.norm(x)).flatten(2) for part in (block.q, block.k, block.v))
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(32), dim=-1)
    expected = x + block.proj_out(torch.einsum("bts,bcs->bct", weight, v).view(x.shape))
    torch.testing.assert_close(block(x), expected)


def test_downsampling_pads_right_and_bottom():
    layer = fill(Downsample(32, with_conv=True), seed=1)
    x = torch.randn(1, 32, 6, 4)
    padded = torch.zeros(1, 32, 7, 5)
    padded[..., :6, :4] = x
    expected = torch.nn.functional.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (1, 32, 3, 2)


def test_options_of_ddconfig():
    ddconfig = {**DDCONFIG, "resamp_with_conv": False, "attn_type": "none", "tanh_out": True}
    model = AutoencoderKL(ddconfig, embed_dim=2)
    assert not any("sample.conv" in key or "attn" in key for key in model.state_dict())
    x = torch.randn(1, 3, 24, 16)  # sizes other than `resolution`
    reconstruction, posterior = model(x)
    assert posterior.mean.shape == (1, 2, 12, 8) and reconstruction.shape == x.shape and reconstruction.abs().max() < 1
    assert AutoencoderKL(DDCONFIG, 2, colorize_nlabels=5).state_dict()["colorize"].shape == (3, 5, 1, 1)


def test_norm_groups():
    model = AutoencoderKL({**DDCONFIG, "norm_groups": 8}, 4)
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    assert set(model.state_dict()) == set(AutoencoderKL(DDCONFIG, 4).state_dict())


def test_batch_of_any_size_gives_the_same_latent():
    model = fill(AutoencoderKL(DDCONFIG, 4), seed=2).eval()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        together, alone = model.encode_moments(x)[0], model.encode_moments(x[1:2])[0]
    torch.testing.assert_close(together[1:2], alone)


# ---------------------------------------------------------------- posterior and codebook


def test_posterior_is_a_diagonal_gaussian():
    mean, logvar = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    posterior = DiagonalGaussian(mean, logvar)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), kl.sum(dim=(1, 2, 3)))
    noise = torch.randn_like(mean)
    sample = posterior.sample(noise)
    torch.testing.assert_close(sample, mean + normal.stddev * noise)
    torch.testing.assert_close(posterior.nll(sample), -normal.log_prob(sample).sum(dim=(1, 2, 3)))
    assert posterior.mode() is mean
    model = fill(AutoencoderKL(DDCONFIG, 4), seed=2)
    with torch.no_grad():
        model.quant_conv.bias[4:] = 100.0
        assert model.encode_moments(torch.randn(1, 3, 16, 16))[1].max() == 20.0


@pytest.mark.parametrize("legacy", [True, False])
def test_codebook_loss_and_gradients(legacy):
    quantizer = VectorQuantizer(7, 2, beta=0.25, legacy=legacy)
    z = torch.randn(2, 2, 3, 3, requires_grad=True)
    quant, loss, indices = quantizer(z)
    points = z.detach().permute(0, 2, 3, 1).reshape(-1, 2)
    distance = torch.cdist(points, quantizer.embedding.weight)
    assert torch.equal(indices, distance.argmin(dim=1))
    error = distance.min(dim=1).values.square().mean() / 2
    torch.testing.assert_close(loss, 1.25 * error)
    loss.backward(retain_graph=True)
    to_codebook, to_encoder = (0.25, 1.0) if legacy else (1.0, 0.25)
    entries = quantizer.embedding.weight.detach()[indices].view(2, 3, 3, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(z.grad, to_encoder * 2 * (z.detach() - entries) / z.numel())
    expected = torch.zeros(7, 2).index_add(0, indices, (entries - z.detach()).permute(0, 2, 3, 1).reshape(-1, 2))
    torch.testing.assert_close(quantizer.embedding.weight.grad, to_codebook * 2 * expected / z.numel())
    z.grad = None
    (quant * torch.arange(quant.numel()).view(quant.shape)).sum().backward()  # straight through
    torch.testing.assert_close(z.grad, torch.arange(quant.numel()).view(quant.shape).float())


def test_codebook_in_pieces(monkeypatch):
    quantizer, z = VectorQuantizer(50, 3), torch.randn(2, 3, 5, 5)
    whole = quantizer.nearest(z)
    monkeypatch.setattr("latent_mt.first_stage.quantize.DISTANCES_AT_ONCE", 200)
    assert torch.equal(quantizer.nearest(z), whole)


def test_index_shapes_and_remap(tmp_path):
    np.save(tmp_path / "used.npy", np.array([4, 1, 6]))
    z = torch.randn(2, 2, 3, 3)
    plain = VectorQuantizer(7, 2, sane_index_shape=True)
    indices = plain(z).indices
    assert indices.shape == (2, 3, 3)
    remapped = VectorQuantizer(7, 2, remap=str(tmp_path / "used.npy"), unknown_index="extra", sane_index_shape=True)
    remapped.load_state_dict({**plain.state_dict(), "used": remapped.used})
    assert set(remapped.state_dict()) == {"embedding.weight", "used"} and remapped.re_embed == 4
    places = remapped(z).indices
    expected = torch.tensor([{4: 0, 1: 1, 6: 2}.get(i, 3) for i in indices.flatten().tolist()]).view(2, 3, 3)
    assert torch.equal(places, expected)
    entries = plain.embedding.weight[torch.tensor([4, 1, 6, 4])[expected]].permute(0, 3, 1, 2)
    torch.testing.assert_close(remapped.get_codebook_entry(places, (2, 3, 3, 2)), entries)
    drawn = VectorQuantizer(7, 2, remap=str(tmp_path / "used.npy"))(z).indices
    assert drawn.shape == (18, 1) and drawn.max() < 3
    assert "different indices 0..4" in complaint(lambda: VectorQuantizer(5, 2, remap=str(tmp_path / "used.npy")))
    assert "nowhere.npy" in complaint(lambda: VectorQuantizer(5, 2, remap="nowhere.npy"))


def test_codebook_usage():
    assert codebook_usage(torch.tensor([5, 5, 0, 0])) == pytest.approx((0.5, 2.0))
    assert codebook_usage(torch.tensor([9, 0, 0])) == pytest.approx((1 / 3, 1.0))


def test_identity():
    first, x = IdentityFirstStage(), torch.randn(1, 3, 5, 7)
    assert (first.embed_dim, first.downsampling, first.in_channels) == (3, 1, 3)
    assert first.encode_moments(x) == (x, None) and first.decode(x) is x and first.encode(x) is x
    first.check_size(5, 7)
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


# ---------------------------------------------------------------- weights and bad input


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_ckpt_path(tmp_path, caplog, suffix):
    saved = fill(AutoencoderKL(DDCONFIG, 4), seed=3)
    state = {**saved.state_dict(), "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(3)}
    path = str(tmp_path / f"model{suffix}")
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state, path)
    with caplog.at_level(logging.INFO, logger="latent_mt"):
        model = AutoencoderKL(DDCONFIG, 4, ckpt_path=path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "loss.discriminator, loss.logvar" in caplog.text
    started = AutoencoderKL(DDCONFIG, 4, ckpt_path=path, ignore_keys=["decoder."])
    assert torch.equal(started.encoder.conv_in.weight, saved.encoder.conv_in.weight)
    assert not torch.equal(started.decoder.conv_in.weight, saved.decoder.conv_in.weight)
    text = complaint(lambda: AutoencoderKL(DDCONFIG, 3, ckpt_path=path))
    assert path in text and "quant_conv.weight" in text
    assert "lacks" in complaint(lambda: VQModel(VQ_DDCONFIG, 8, 4, ckpt_path=path)) or "there and" in text


def test_damaged_or_foreign_checkpoints(tmp_path):
    model = AutoencoderKL(DDCONFIG, 4)
    path = tmp_path / "model.pt"

    def refused(state) -> str:
        torch.save(state, path)
        return complaint(lambda: AutoencoderKL(DDCONFIG, 4, ckpt_path=str(path)))

    assert "'unknown.weight'" in refused({**model.state_dict(), "unknown.weight": torch.ones(1)})
    assert "'encoder.conv_in.bias'" in refused(
        {k: v for k, v in model.state_dict().items() if k != "encoder.conv_in.bias"}
    )
    assert "is a diffusion model's checkpoint" in refused({"model.diffusion_model.out.2.bias": torch.ones(1)})
    assert "no state dict" in refused([1, 2])
    assert "objects" in refused({"state_dict": model.state_dict(), "callbacks": Fraction(1)})
    path.write_bytes(b"PK\x03\x04 cut off")
    assert str(path) in complaint(lambda: AutoencoderKL(DDCONFIG, 4, ckpt_path=str(path)))
    assert "no such file" in complaint(lambda: AutoencoderKL(DDCONFIG, 4, ckpt_path="nowhere.ckpt"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_type": "linear"}, "attn_type 'linear'"),
        ({"use_linear_attn": True}, "use_linear_attn"),
        ({"ch_multt": [1]}, "did you mean ch_mult?"),
        ({"ch": 20}, "multiple of 32"),
        ({"ch": "wide"}, "ddconfig.ch 'wide'"),
        ({"ch_mult": []}, "ddconfig.ch_mult"),
        ({"ch_mult": 2}, "ddconfig.ch_mult"),
        ({"num_res_blocks": 0}, "ddconfig.num_res_blocks"),
        ({"dropout": 1.5}, "ddconfig.dropout"),
        ({"double_z": False}, "ddconfig.double_z: must be true"),
        ({"double_z": 1}, "write true or false"),
        ({"give_pre_end": True}, "give_pre_end"),
    ],
)
def test_bad_ddconfig(changes, words):
    assert words in complaint(lambda: AutoencoderKL({**DDCONFIG, **changes}, 4))


def test_bad_arguments():
    without = {key: value for key, value in DDCONFIG.items() if key != "z_channels"}
    assert "ddconfig.z_channels is missing" in complaint(lambda: AutoencoderKL(without, 4))
    assert "embed_dim 0" in complaint(lambda: AutoencoderKL(DDCONFIG, 0))
    assert "adam_betas [0.5, 1.0]" in complaint(lambda: AutoencoderKL(DDCONFIG, 4, adam_betas=[0.5, 1.0]))
    assert "n_embed 0" in complaint(lambda: VQModel(VQ_DDCONFIG, 0, 4))
    assert "must be false" in complaint(lambda: VQModel(DDCONFIG, 8, 4))
    model = AutoencoderKL(DDCONFIG, 4)
    assert "15 x 16" in complaint(lambda: model.check_size(15, 16))
    assert "take 16 x 16" in complaint(lambda: model(torch.zeros(1, 3, 16, 17)))
    with pytest.raises(ValueError, match="expected images"):
        model(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="expected latents"):
        model.decode(torch.zeros(1, 3, 8, 8))
