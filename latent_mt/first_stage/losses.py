"""The losses that LDM trains its first stages with: reconstruction, perceptual, adversarial, and KL or codebook.

Constructor keywords, formulas and state-dict names (`logvar`, `discriminator.*`) of `LPIPSWithDiscriminator` and
`VQLPIPSWithDiscriminator`. Images are float [B, C, H, W] in [-1, 1]. Sums are over an image's values, then means over images.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from guided_mt.errors import UserError, how_to_install
from guided_mt.runs import checkpoint
from guided_mt.runs.weights import refuse_not_finite

from .reconstruction import Reconstruction

VGG = "vgg16-397923af.pth"  # torchvision's file
MAX_ADAPTIVE_WEIGHT = 1e4
log = logging.getLogger("latent_mt")


# ---------------------------------------------------------------- formulas


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The discriminator's hinge loss, 0-dim, of its logits for real and for reconstructed images."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The discriminator's cross-entropy, 0-dim, of its logits for real and for reconstructed images."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
PIXEL_LOSSES = {"l1": lambda a, b: (a - b).abs(), "l2": lambda a, b: (a - b).square()}


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|grad nll| / |grad g_loss| at the last layer, within 0..1e4 (Esser et al. 2021, eq. 7): both then pull equally hard."""
    nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
    g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


# ---------------------------------------------------------------- networks


def build_discriminator(channels: int, layers: int, use_actnorm: bool, ndf: int = 64) -> nn.Module:
    """PatchGAN of taming-transformers with its initial weights: [B, channels, H, W] -> logits [B, 1, h, w]."""
    try:
        from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
    except ImportError as error:
        raise UserError(
            f"the discriminator needs package taming-transformers ({error}): pip install taming-transformers, or train without "
            "it (disc_factor: 0)"
        ) from None
    network = NLayerDiscriminator(input_nc=channels, ndf=ndf, n_layers=layers, use_actnorm=use_actnorm)
    return network.apply(weights_init)


def find_vgg() -> Path | None:
    """torchvision's VGG-16 where torch.hub or we keep downloads; None where it isn't."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = Path(os.environ.get("MT_DIFFUSION_CACHE") or cache / "mt-diffusion")
    folders = (own, Path(torch.hub.get_dir()) / "checkpoints")
    return next((folder / VGG for folder in folders if (folder / VGG).is_file()), None)


def build_lpips() -> nn.Module | None:
    """LPIPS 0.1 on VGG-16, frozen; None, with a warning that says what to do, where package or weights are missing.

    Nothing is downloaded. Raises UserError for a damaged file.
    """
    try:
        import lpips
    except ImportError as error:
        log.warning("no perceptual loss: package lpips is missing (%s): %s", error, how_to_install("lpips"))
        return None
    file = find_vgg()
    if file is None:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        log.warning(
            "no perceptual loss: put torchvision's %s into %s (perceptual_weight: 0 says so on purpose)", VGG, folder
        )
        return None
    state = checkpoint.read_weights(file)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips calls torchvision in a deprecated way
        model = lpips.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False)
    # lpips cuts VGG into slices and keeps the layers' numbers: slice2.5.weight is features.5.weight.
    wanted = {name: "features." + name.split(".", 1)[1] for name in model.net.state_dict()}
    try:
        model.net.load_state_dict({name: state[published] for name, published in wanted.items()})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{file}: is not torchvision's VGG-16 ({str(error).splitlines()[0]}); remove it") from None
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------- losses


class AdversarialLoss(nn.Module):
    """What both losses share. Subclasses have `total`. Raises UserError for options that LDM has no working code for."""

    def __init__(
        self,
        disc_start: int,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        pixelloss_weight: float = 1.0,
    ):
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise UserError(f"lossconfig.disc_loss '{disc_loss}' is none of {', '.join(DISCRIMINATOR_LOSSES)}")
        if disc_conditional:
            raise UserError("lossconfig.disc_conditional: autoencoders have no condition to show it; leave it out")
        weights = {"disc_factor": disc_factor, "disc_weight": disc_weight, "perceptual_weight": perceptual_weight}
        for name, value in weights.items():
            if value < 0:
                raise UserError(f"lossconfig.{name} {value}: write 0 or more")
        if pixelloss_weight != 1:
            log.warning(
                "lossconfig.pixelloss_weight %g has no effect: LDM reads it and doesn't use it", pixelloss_weight
            )
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.discriminator_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.discriminator: Any = None
        if disc_factor > 0:
            self.discriminator = build_discriminator(disc_in_channels, disc_num_layers, use_actnorm, disc_ndf)
        self.perceptual_loss = build_lpips() if perceptual_weight > 0 else None
        self.perceptual_weight = perceptual_weight if self.perceptual_loss is not None else 0.0

    def train(self, mode: bool = True) -> AdversarialLoss:
        """LPIPS has dropout layers, which a frozen measure must never use."""
        super().train(mode)
        if self.perceptual_loss is not None:
            self.perceptual_loss.eval()
        return self

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in `step`, counted from 0 in steps of the autoencoder."""
        return self.discriminator is not None and step >= self.disc_start

    def reconstruction_error(self, pixels: Tensor, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """(pixel errors [B, C, H, W] + perceptual distance, that distance [B, 1, 1, 1])."""
        if self.perceptual_loss is None:
            return pixels, pixels.new_zeros(len(x), 1, 1, 1)
        perceptual = self.perceptual_loss(x.contiguous(), reconstruction.contiguous())
        return pixels + self.perceptual_weight * perceptual, perceptual

    def generator(
        self, x: Tensor, made: Reconstruction, step: int, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the autoencoder's loss, 0-dim; {column: 0-dim}) of images x [B, C, H, W] and what the first stage made of them."""
        loss, nll, record = self.total(x, made)
        zero = loss.new_zeros(())
        g_loss = weight = zero
        if self.adversarial(step):
            g_loss = -self.discriminator(made.image).mean()
            # Without gradients, as in validation, LDM leaves the term out too.
            weight = adaptive_weight(nll, g_loss, last_layer) * self.disc_weight if torch.is_grad_enabled() else zero
            loss = loss + weight * self.disc_factor * g_loss
        record = {"loss": loss, **record, "g_loss": g_loss, "d_weight": weight}
        return loss, {name: value.detach().float() for name, value in record.items()}

    def total(self, x: Tensor, made: Reconstruction) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss without the discriminator, the reconstruction's part that `adaptive_weight` reads, columns)."""
        raise NotImplementedError

    def discriminate(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the discriminator's loss, 0-dim; {column: 0-dim})."""
        real, fake = self.discriminator(x.detach()), self.discriminator(reconstruction.detach())
        loss = self.disc_factor * self.discriminator_loss(real, fake)
        record = {"d_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach().float() for name, value in record.items()}

    def names(self) -> list[str]:
        """The columns, in their order."""
        shown = ["g_loss", "d_weight", "d_loss", "logits_real", "logits_fake"] if self.discriminator is not None else []
        perceptual = ["perceptual"] if self.perceptual_loss is not None else []
        return ["loss", *self.own_names, *perceptual, *shown]

    own_names: tuple[str, ...] = ()

    def trained_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen LPIPS network, which is not this loss's own."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("perceptual_loss.")}

    def load_trained_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """The counterpart of `trained_state`. Raises UserError where entries differ, or hold NaN."""
        own = self.trained_state()
        state = {key: value for key, value in state.items() if not key.startswith("perceptual_loss.")}
        wrong = [
            key for key in {**own, **state} if key not in own or key not in state or own[key].shape != state[key].shape
        ]
        if wrong:
            raise UserError(f"{where}: 'loss.{wrong[0]}' does not fit the discriminator of lossconfig")
        refuse_not_finite(state, where)
        self.load_state_dict(state, strict=False)

    def generator_parameters(self) -> list[nn.Parameter]:
        """The loss's own parameters that the autoencoder's optimiser trains."""
        return []


class LPIPSWithDiscriminator(AdversarialLoss):
    """For AutoencoderKL: sum((|x - x'| + LPIPS) / exp(logvar) + logvar) / B + kl_weight KL / B + d_weight g_loss.

    learn_logvar (ours): train `logvar`, one number for all values. LDM has it as a parameter but gives it to no optimiser, so that
    it stays logvar_init, which is the default here too.
    """

    own_names = ("nll_loss", "rec_loss", "kl_loss", "logvar")

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        *,
        learn_logvar: bool = False,
        **adversarial: Any,
    ):
        super().__init__(disc_start, **adversarial)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)), requires_grad=learn_logvar)

    @override
    def generator_parameters(self) -> list[nn.Parameter]:
        return [self.logvar] if self.logvar.requires_grad else []

    @override
    def total(self, x: Tensor, made: Reconstruction) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        error, perceptual = self.reconstruction_error((x - made.image).abs(), x, made.image)
        nll = (error / self.logvar.exp() + self.logvar).sum() / len(x)
        record = {"nll_loss": nll, "rec_loss": error.mean(), "kl_loss": made.latent_loss, "logvar": self.logvar}
        return nll + self.kl_weight * made.latent_loss, nll, record | {"perceptual": perceptual.mean()}


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """For VQModel: mean(pixel_loss + LPIPS) + codebook_weight emb_loss + d_weight g_loss.

    n_classes: LDM's, for its log of the codebook's use, which every VQ run has here. perceptual_loss: "lpips".
    """

    own_names = ("nll_loss", "quant_loss")

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        *,
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        **adversarial: Any,
    ):
        if perceptual_loss != "lpips":
            raise UserError(f"lossconfig.perceptual_loss '{perceptual_loss}': only lpips is supported")
        if pixel_loss not in PIXEL_LOSSES:
            raise UserError(f"lossconfig.pixel_loss '{pixel_loss}' is none of {', '.join(PIXEL_LOSSES)}")
        super().__init__(disc_start, **adversarial)
        self.codebook_weight, self.pixel_loss = codebook_weight, PIXEL_LOSSES[pixel_loss]

    @override
    def total(self, x: Tensor, made: Reconstruction) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        error, perceptual = self.reconstruction_error(self.pixel_loss(x, made.image), x, made.image)
        nll = error.mean()
        record = {"nll_loss": nll, "quant_loss": made.latent_loss, "perceptual": perceptual.mean()}
        return nll + self.codebook_weight * made.latent_loss, nll, record
