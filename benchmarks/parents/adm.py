"""guided-diffusion's networks, process, samplers and crops beside ours."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from guided_mt.data import transforms
from guided_mt.diffusion.respacing import create_gaussian_diffusion, space_timesteps
from guided_mt.diffusion.sampling import sample
from guided_mt.diffusion.sampling.guidance import classifier_guidance
from guided_mt.networks.classifier import create_classifier
from guided_mt.networks.create import create_model

from .inputs import PROCESS, SEEDS, SHAPE, STEPS, classifier, fill, images, network, normals
from .standins import given_normals
from .table import Row, by_choice, distance, same

UNETS: dict[str, dict[str, Any]] = {
    "ADM's defaults": {"attention_resolutions": "8"},
    "classes, up- and downsampling blocks": {
        "attention_resolutions": "16,8", "class_cond": True, "resblock_updown": True, "num_head_channels": 32,
        "use_new_attention_order": True, "use_scale_shift_norm": True,
    },
    "learned variances, new attention order off": {"attention_resolutions": "8", "learn_sigma": True, "num_heads": 2},
}  # fmt: skip
COMMON = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
TABLES = ("betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
          "posterior_mean_coef2", "timestep_map")  # fmt: skip


def process(respacing: str = "", **options: Any) -> Any:
    """guided-diffusion's process of these options."""
    from guided_diffusion.script_util import create_gaussian_diffusion as create

    return create(**{**PROCESS, **options, "timestep_respacing": respacing})


def unets() -> list[Row]:
    """U-Net: outputs, names and shapes of the weights."""
    from guided_diffusion.script_util import create_model as create

    rows = []
    for name, options in UNETS.items():
        theirs = fill(create(**{**COMMON, **options}))
        ours = create_model(**{**COMMON, **options}).eval()
        ours.load_state_dict(theirs.state_dict())
        x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([3, 800])
        y = torch.tensor([1, 5]) if options.get("class_cond") else None
        with torch.no_grad():
            rows.append(
                same(f"U-Net, {name}: output, and its state dict read strictly", ours(x, t, y), theirs(x, t, y))
            )
    return rows


def classifiers() -> Row:
    """Classifier: logits."""
    from guided_diffusion.script_util import create_classifier as create

    arguments = (64, False, 32, 1, "8", True, True, "adaptive")
    theirs = fill(create(*arguments))
    ours = create_classifier(*arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)), torch.tensor([3, 800])
    with torch.no_grad():
        return same("classifier: logits, and its state dict read strictly", ours(x, t), theirs(x, t))


def schedules() -> Row:
    """Schedules and posteriors for every combination of the diffusion flags."""
    flags = ("learn_sigma", "sigma_small", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas")
    ours_all, theirs_all = [], []
    for schedule, respacing in itertools.product(("linear", "cosine"), ("", "250", "ddim25", "10,15,20")):
        for values in itertools.product((False, True), repeat=len(flags)):
            options = {**dict(zip(flags, values, strict=True)), "noise_schedule": schedule}
            ours = create_gaussian_diffusion(steps=1000, timestep_respacing=respacing, **options)
            theirs = process(respacing, **options)
            ours_all.append([getattr(ours, name) for name in TABLES])
            theirs_all.append([getattr(theirs, name) for name in TABLES])
    return same(f"schedules and posteriors, {len(ours_all)} combinations of flags", ours_all, theirs_all, tolerance=0)


def spacings() -> Row:
    """--timestep_respacing: the timesteps kept."""
    from guided_diffusion.respace import space_timesteps as space

    words = ["1000", "250", "100", "37", "ddim25", "ddim50", "ddim250", "10,15,20", "1,1,300"]
    ours, theirs = ([sorted(f(1000, word)) for word in words] for f in (space_timesteps, space))
    return same(f"`--timestep_respacing` {', '.join(words)}: the timesteps kept", ours, theirs, tolerance=0)


def losses() -> Row:
    """Losses of every kind at given noise."""
    x, noise, t = images(), normals(1)[0], torch.tensor([0, 700])
    ours_all, theirs_all = [], []
    for learn, kl, start, scaled in itertools.product((False, True), repeat=4):
        options = {"learn_sigma": learn, "use_kl": kl, "predict_xstart": start, "rescale_learned_sigmas": scaled}
        model = network if learn else lambda x, t: network(x, t)[:, :3]
        for found, made in (
            (ours_all, create_gaussian_diffusion(**{**PROCESS, **options})),
            (theirs_all, process(**options)),
        ):
            terms = made.training_losses(model, x, t, noise=noise)
            found.append({key: terms[key] for key in ("loss", "mse", "vb") if key in terms})
    return same(f"losses, {len(ours_all)} combinations of flags", ours_all, theirs_all)


def bits_per_dimension() -> Row:
    """calc_bpd_loop."""
    x, noise = images(), normals(STEPS)
    theirs, ours = process(str(STEPS)), create_gaussian_diffusion(**PROCESS, timestep_respacing=str(STEPS))
    with given_normals(*noise):
        expected = theirs.calc_bpd_loop(network, x)
    with given_normals(*noise):
        found = ours.calc_bpd_loop(network, x)
    return same("`calc_bpd_loop`: total, prior, and the terms in their order of time", dict(found), dict(expected))


# ---------------------------------------------------------------- samplers


def drawn_by_adm(sampler: str = "ddpm", scale: float = 0.0, respacing: str = str(STEPS)) -> torch.Tensor:
    """z_0 by guided-diffusion's loops, from the noise that our samplers take. scale: of the classifier, 0 for none."""
    theirs = process(respacing)
    loop = theirs.p_sample_loop if sampler == "ddpm" else theirs.ddim_sample_loop
    labels, start, *noise = torch.tensor([1, 3]), *normals(theirs.num_timesteps + 1)
    guide = classifier_guidance(classifier, labels, scale)  # a gradient by torch.autograd, of the same formula
    with given_normals(*noise):
        return loop(network, SHAPE, noise=start, cond_fn=guide if scale else None, model_kwargs={}, device="cpu")


def drawn_by_us(sampler: str = "ddpm", scale: float = 0.0, respacing: str = str(STEPS), **options: Any) -> torch.Tensor:
    ours = create_gaussian_diffusion(**PROCESS, timestep_respacing=respacing)
    guide = classifier_guidance(classifier, torch.tensor([1, 3]), scale) if scale else None
    return sample(network, ours, {}, SHAPE, sampler=sampler, seeds=SEEDS, cond_fn=guide, **options).x_start


def samplers() -> list[Row]:
    """Samplers, with and without a classifier."""
    rows = [
        same("`--timestep_respacing 10`: ancestral steps with the learned variance", drawn_by_us(), drawn_by_adm()),
        same(
            "`--use_ddim True --timestep_respacing ddim25`",
            drawn_by_us("ddim", respacing="ddim25"), drawn_by_adm("ddim", respacing="ddim25"),
        ),
        same("classifier guidance, ancestral, scale 2", drawn_by_us(scale=2.0), drawn_by_adm(scale=2.0)),
    ]  # fmt: skip
    for scale in (1.0, 200.0):
        theirs = drawn_by_adm("ddim", scale)
        ours = drawn_by_us("ddim", scale, clip_before_guidance=True)
        rows.append(same(f"classifier guidance, `--use_ddim True`, scale {scale:g}", ours, theirs))
        gap, _ = distance(drawn_by_us("ddim", scale), theirs)
        why = "clips z_0 after the gradient is added, so that it stays in [-1, 1]"
        rows.append(by_choice(f"classifier guidance, `--sampler ddim`, scale {scale:g}", gap, why))
    return rows


# ---------------------------------------------------------------- data


def crops() -> list[Row]:
    """Centre and random crops of images."""
    from guided_diffusion import image_datasets

    rng, ours, theirs = np.random.default_rng(0), [], []
    pictures = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((90, 131), (64, 40), (33, 200))
    ]
    for picture in pictures:
        ours.append(transforms.center_crop_arr(picture, 32))
        theirs.append(image_datasets.center_crop_arr(picture, 32))
    rows = [same("centre crop and resizing", ours, theirs, tolerance=0)]
    ours, theirs = [], []
    for picture in pictures:
        uniforms = rng.random(3)
        with _drawn(uniforms):
            theirs.append(image_datasets.random_crop_arr(picture, 32))
        ours.append(transforms.random_crop_arr(picture, 32, uniforms=uniforms))
    return [*rows, same("random crop (`classifier_train.py`)", ours, theirs, tolerance=0)]


class _drawn:
    """Inside, random.randrange(a, b) takes these uniform numbers in turn."""

    def __init__(self, uniforms: Sequence[float]):
        self.left = list(uniforms)

    def __enter__(self) -> None:
        self.original = random.randrange
        random.randrange = self.take  # type: ignore[assignment]

    def take(self, start: int, stop: int | None = None) -> int:
        low, high = (0, start) if stop is None else (start, stop)
        return low + int(self.left.pop(0) * (high - low))

    def __exit__(self, *error: object) -> None:
        random.randrange = self.original  # type: ignore[assignment]


COMPARISONS: list[Callable[[], Row | list[Row]]] = [
    unets, classifiers, schedules, spacings, losses, bits_per_dimension, samplers, crops,
]  # fmt: skip
