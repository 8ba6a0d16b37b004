"""Every kind of network on the device against the same in float64 on the CPU: outputs and gradients, and memory formats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.generation.build import build_model
from guided_mt.networks.classifier import EncoderUNetModel

from ..forms import COMPARED, COMPARED_DIT, TINY, TINY_DIT, Size, fill, settings
from ..runner import Stage, within
from .arithmetic import FP32, MAX_TIMESTEP, as_double, distance, joined, precisions

BATCH = 4
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """build: the network, untrained. inputs: what it is called with, float32 on the CPU. call: (network, inputs) -> outputs."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    call: Callable[[nn.Module, Inputs], list[Tensor]]


def networks(size: Size) -> list[Network]:
    """All kinds, at the size."""
    transformer = TINY_DIT if size is TINY else COMPARED_DIT
    made = [_denoiser(name, form, size, *more) for name, form, more in DENOISERS]
    made += [_denoiser(name, form, transformer, *more) for name, form, more in TRANSFORMERS]
    made += [_classifier(pool, size) for pool in ("attention", "adaptive", "spatial_v2")]
    return [*made, *(_autoencoder(kind, size) for kind in ("KL", "VQ"))]


DENOISERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("U-Net with classes", "class_cond", ()),
    ("U-Net with up- and down-sampling blocks", "single", ("--resblock_updown", "True")),
    (
        "U-Net, new attention order, no FiLM",
        "single",
        ("--use_new_attention_order", "True", "--use_scale_shift_norm", "False"),
    ),
    ("form U, masked images", "U", ()),
    ("form X, masked images", "X", ()),
    ("form any, masked images and label tokens", "any", ()),
    ("form U, label head M", "label", ()),
    ("form U, label head E", "label", ("--mt_label_head", "E", "--classifier_width", "64", "--classifier_depth", "1")),
)

TRANSFORMERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("transformer with classes", "class_cond", ()),
    ("transformer, form any, tokens attended to", "any", ()),
    ("transformer, form any, tokens in the sequence", "any", ("--dit_context", "in-context")),
)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _denoiser(name: str, form: str, size: Size, *more: str) -> Network:
    config = settings(form, size, "none", *more)

    def inputs() -> Inputs:
        found = {"z": _noise(BATCH, 3, size.image_size, size.image_size), "t": _timesteps()}
        if form == "class_cond":
            found["y"] = torch.arange(BATCH) % size.classes
        if form in ("X", "any"):
            found["masked"] = _noise(BATCH, 3, size.image_size, size.image_size, seed=1)
        if form == "any":
            found |= {"label": torch.arange(BATCH) % size.classes, "given": torch.arange(BATCH) % 2 == 0}
        return found

    def call(network: nn.Module, x: Inputs) -> list[Tensor]:
        modalities = {key: x[key] for key in ("masked", "label") if key in x}
        options: dict[str, Any] = {"y": x["y"]} if "y" in x else {}
        if "given" in x:
            options["given"] = dict.fromkeys(modalities, x["given"])
        made = network(x["z"], x["t"], modalities, **options)
        return [made.output, *made.predictions.values()]

    return Network(name, lambda: build_model(config), inputs, call)


def _timesteps() -> Tensor:
    return torch.arange(BATCH) * (MAX_TIMESTEP // BATCH)


def _classifier(pool: str, size: Size) -> Network:
    def build() -> nn.Module:
        attended = (2,) if size.image_size >= 16 else (1,)
        options = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 64, "pool": pool}
        return EncoderUNetModel(size.image_size, 3, 64, size.classes, 1, attended, channel_mult=(1, 2), **options)

    def inputs() -> Inputs:
        return {"x": _noise(BATCH, 3, size.image_size, size.image_size), "t": _timesteps()}

    return Network(f"classifier, pool {pool}", build, inputs, lambda network, x: [network(x["x"], x["t"])])


def _autoencoder(kind: str, size: Size) -> Network:
    def build() -> nn.Module:
        from latent_mt.first_stage.first_stages import AutoencoderKL, VQModel

        side, channels = size.image_size, 4 if kind == "KL" else 3
        config = {"double_z": kind == "KL", "z_channels": channels, "resolution": side, "in_channels": 3, "out_ch": 3}
        config |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [side // 2], "dropout": 0.0}
        if kind == "KL":
            return AutoencoderKL(ddconfig=config, embed_dim=channels)
        return VQModel(ddconfig=config, embed_dim=channels, n_embed=64)

    def call(network: nn.Module, x: Inputs) -> list[Tensor]:
        hidden = network.quant_conv(network.encoder(x["x"]))  # before the codebook: which entry is nearest may flip
        return [hidden, network.decoder(network.post_quant_conv(x["z"]))]

    def inputs() -> Inputs:
        side = size.image_size
        return {
            "x": _noise(BATCH, 3, side, side),
            "z": _noise(BATCH, 4 if kind == "KL" else 3, side // 2, side // 2, seed=1),
        }

    return Network(f"autoencoder {kind}", build, inputs, call)


def run(stage: Stage) -> None:
    size = TINY if stage.tiny else COMPARED
    for network in networks(size):
        stage.check(f"network: {network.name}", lambda network=network: compare(network, stage.device), 3.0)
    form_x = next(network for network in networks(size) if network.name.startswith("form X"))
    stage.check("memory formats: channels-last and contiguous", lambda: memory_formats(form_x, stage.device))


def compare(network: Network, device: torch.device) -> dict[str, Any]:
    """Outputs and gradients in each precision. Raises Wrong for the first that is too far off."""
    plain, inputs = network.build(), network.inputs()
    fill(plain)
    reference = _run(network, copy.deepcopy(plain).double(), {k: as_double(x) for k, x in inputs.items()})
    found: dict[str, Any] = {}
    plain = plain.to(device)
    if hasattr(plain, "to_fast_layout"):
        plain.to_fast_layout()
    there = {name: x.to(device) for name, x in inputs.items()}
    for precision in precisions(device):
        if precision is not FP32 and not any(hasattr(part, "precision") for part in plain.modules()):
            found |= _by_autocast(network, plain, there, reference, precision)
            continue
        with precision.active(plain):
            outputs, gradient = _run(network, plain, there)
        found |= _distances(plain, outputs, gradient, reference, precision, found)
    return found


def _by_autocast(
    network: Network, plain: nn.Module, there: Inputs, reference: tuple[Tensor, Tensor], precision: Any
) -> dict[str, Any]:
    """As latent models run their first stages: under the caller's autocast."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.flag)
    kind = next(iter(there.values())).device.type
    with precision.active(plain), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
        outputs, gradient = _run(network, plain, there)
    return _distances(plain, outputs, gradient, reference, precision, {})


def _distances(
    plain: nn.Module,
    outputs: Tensor,
    gradient: Tensor,
    reference: tuple[Tensor, Tensor],
    precision: Any,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    forward, backward = distance(outputs, reference[0]), distance(gradient, reference[1])
    found = {precision.name: forward, f"{precision.name} gradient": backward}
    for error, allowed in (
        (forward, precision.tolerance(plain)),
        (backward, precision.tolerance(plain, backward=True)),
    ):
        within(error, allowed, **before, **found)
    return found


def _run(network: Network, module: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(all outputs, the gradient of a fixed mixture of them), each one vector."""
    module.zero_grad(set_to_none=True)
    outputs = network.call(module, inputs)
    loss = sum((x.float() if x.dtype is not torch.float64 else x).mul(_weights(x)).sum() for x in outputs)
    loss.backward()
    gradient = joined(p.grad for _, p in sorted(module.named_parameters()) if p.grad is not None)
    return joined(outputs), gradient


def _weights(x: Tensor) -> Tensor:
    """Fixed numbers of the shape of x, the same on every device."""
    return _noise(*x.shape, seed=2).to(x.device, torch.float64 if x.dtype is torch.float64 else torch.float32)


def memory_formats(network: Network, device: torch.device) -> dict[str, Any]:
    """Both memory formats against float64, in fp32."""
    plain, inputs = network.build(), network.inputs()
    fill(plain)
    outputs, gradient = _run(network, copy.deepcopy(plain).double(), {k: as_double(x) for k, x in inputs.items()})
    plain, found = plain.to(device), {}
    there = {name: x.to(device) for name, x in inputs.items()}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        plain.to(memory_format=layout)
        with FP32.active(plain):
            made, slope = _run(network, plain, there)
        found[name], found[f"{name} gradient"] = distance(made, outputs), distance(slope, gradient)
        within(found[name], FP32.tolerance(plain), **found)
        within(found[f"{name} gradient"], FP32.tolerance(plain, backward=True), **found)
    return found
