"""LDM's first stages (Rombach et al. 2022): its constructor keywords, state-dict names and numerics, as plain modules.

Images are float in [-1, 1]. How they are trained is in losses.py and training.first_stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError

from .ddconfig import read_ddconfig
from .layers import Decoder, Encoder
from .losses import AdversarialLoss, LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from .posterior import DiagonalGaussian
from .quantize import Quantized, VectorQuantizer, codebook_usage, widened
from .reconstruction import Reconstruction
from .weights import load_first_stage

LOGVAR_RANGE = (-30.0, 20.0)
ADAM_BETAS = (0.5, 0.9)


class Autoencoder(nn.Module):
    """What every first stage has: embed_dim latent channels, `downsampling` pixels per latent position and side, in_channels.

    Where `ckpt_path` is given its weights are loaded: a .ckpt, .pt or .safetensors file, or a run or checkpoint folder of
    autoencoder-train (the averaged weights), or a folder of diffusers' with its config.json. Entries that begin with one of
    `ignore_keys` are left out. Raises UserError.
    """

    embed_dim: int
    downsampling: int
    in_channels: int

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, in_channels, H, W] -> mean and log variance of the latent [B, embed_dim, h, w]; None: it has no variance."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """z [B, embed_dim, h, w] -> [B, out_ch, H, W]."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for images that don't divide into latent positions."""
        step = self.downsampling
        if height % step or width % step or not height or not width:
            near = " x ".join(str(max(step, round(side / step) * step)) for side in (height, width))
            raise UserError(
                f"images of {height} x {width} pixels don't fit a first stage that divides by {step}; take {near}"
            )

    def to_fast_layout(self) -> Autoencoder:
        """The memory format of the device's fastest convolutions (as guided_mt.networks.unet); call after moving. Returns self."""
        parameter = next(self.parameters(), None)
        on_cuda = parameter is not None and parameter.is_cuda
        return self.to(memory_format=torch.channels_last if on_cuda else torch.contiguous_format)


class ConvolutionalAutoencoder(Autoencoder):
    """Encoder, decoder and the two 1x1 convolutions around the latent: what AutoencoderKL and VQModel share.

    What its training (training.first_stage) asks of it: loss_class judges a `Reconstruction`; `noise` is what `reconstruct`
    draws with; `report` makes the columns own_columns of summed `Reconstruction.figures`. lossconfig, scheduler_config,
    adam_betas, lr_g_factor (of the autoencoder's learning rate) and batch_resize_range are LDM's keys of the same names.
    """

    loss_class: type[AdversarialLoss]
    own_columns: tuple[str, ...] = ()
    lossconfig: Mapping[str, Any] | None
    scheduler_config: Mapping[str, Any] | None
    adam_betas: tuple[float, float]
    lr_g_factor: float = 1.0
    batch_resize_range: Sequence[int] | None = None

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, double_z: bool):
        super().__init__()
        config = read_ddconfig(ddconfig)
        if config.double_z != double_z:
            with_variance = "true" if double_z else "false"
            raise UserError(f"ddconfig.double_z: must be {with_variance} in {type(self).__name__}")
        if type(embed_dim) is not int or embed_dim < 1:
            raise UserError(f"embed_dim {embed_dim!r}: write a whole number of 1 or more")
        self.ddconfig, self.embed_dim = config, embed_dim
        self.downsampling, self.in_channels = config.downsampling, config.in_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _add_convolutions(self, moments: int) -> None:
        """After a codebook, so that the state dict has LDM's order."""
        self.quant_conv = nn.Conv2d(moments * self.ddconfig.z_channels, moments * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, self.ddconfig.z_channels, 1)

    def _finish(
        self, colorize_nlabels: int | None, monitor: str | None, ckpt_path: str | None, ignore_keys: Sequence[str]
    ) -> None:
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        self.monitor, self.ckpt_path, self.ignore_keys = monitor, ckpt_path, tuple(ignore_keys)
        if ckpt_path:
            load_first_stage(self, self.ddconfig, ckpt_path, ignore_keys)

    @property
    def last_layer(self) -> Tensor:
        """Where LDM compares the gradients of its losses."""
        return self.decoder.conv_out.weight

    def get_last_layer(self) -> Tensor:
        """`last_layer` under latent-diffusion's name."""
        return self.last_layer

    @property
    def figure_count(self) -> int:
        """How many `Reconstruction.figures` there are."""
        return 0

    def noise(self, streams: SampleStreams, images: int, height: int, width: int) -> Tensor | None:
        """The noise that `reconstruct` takes for `images` images of each sample, [samples * images, ...]; None: it takes none.

        height, width: of the images, in pixels.
        """
        return None

    def reconstruct(self, x: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """x [B, in_channels, H, W] there and back. noise: see `noise`; None: by way of the latent's mean."""
        raise NotImplementedError

    def report(self, figures: Tensor) -> dict[str, float]:
        """{column: value} for own_columns, from `Reconstruction.figures` summed over what is reported."""
        return {}

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected images [B, {self.in_channels}, H, W], got {list(x.shape)}")
        self.check_size(*x.shape[-2:])

    def _decode(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.embed_dim:
            raise ValueError(f"expected latents [B, {self.embed_dim}, h, w], got {list(z.shape)}")
        return self.decoder(self.post_quant_conv(z))


class AutoencoderKL(ConvolutionalAutoencoder):
    """A Gaussian latent.

    scheduler_config and adam_betas are ours: LDM has the one for VQModel alone and the other fixed. monitor and image_key are
    LDM's and without meaning here.
    """

    loss_class = LPIPSWithDiscriminator

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        lossconfig: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        adam_betas: Sequence[float] = ADAM_BETAS,
    ):
        super().__init__(ddconfig, embed_dim, double_z=True)
        self.lossconfig, self.image_key, self.scheduler_config = lossconfig, image_key, scheduler_config
        self.adam_betas = check_betas(adam_betas)
        self._add_convolutions(moments=2)
        self._finish(colorize_nlabels, monitor, ckpt_path, ignore_keys)

    @override
    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        mean, logvar = widened(self.quant_conv(self.encoder(x))).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images [B, C, S, S] in [-1, 1] -> the Gaussian of their latents."""
        return DiagonalGaussian(*self.encode_moments(x))

    @override
    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z)

    def forward(
        self, x: Tensor, sample_posterior: bool = True, noise: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """(reconstruction of a draw from the posterior, or of its mode; posterior). noise: see DiagonalGaussian.sample."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise) if sample_posterior else posterior.mode()), posterior

    @override
    def noise(self, streams: SampleStreams, images: int, height: int, width: int) -> Tensor:
        height, width = height // self.downsampling, width // self.downsampling
        return streams.normal(images, self.embed_dim, height, width).flatten(0, 1)

    @override
    def reconstruct(self, x: Tensor, noise: Tensor | None = None) -> Reconstruction:
        image, posterior = self(x, sample_posterior=noise is not None, noise=noise)
        return Reconstruction(image, posterior.kl().mean(), torch.zeros(0, dtype=torch.int64, device=x.device))


class VQModel(ConvolutionalAutoencoder):
    """A latent of codebook entries. beta, legacy: see VectorQuantizer, whose defaults are what LDM's configurations get.

    use_ema is LDM's and without meaning here: run.ema_rate says it.
    """

    loss_class = VQLPIPSWithDiscriminator
    own_columns = ("codes_used", "code_perplexity")

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        lossconfig: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        beta: float = 0.25,
        legacy: bool = True,
        adam_betas: Sequence[float] = ADAM_BETAS,
    ):
        super().__init__(ddconfig, embed_dim, double_z=False)
        self.adam_betas = check_betas(adam_betas)
        if type(n_embed) is not int or n_embed < 1:
            raise UserError(f"n_embed {n_embed!r}: write a whole number of 1 or more")
        self.n_embed, self.lossconfig, self.image_key = n_embed, lossconfig, image_key
        self.batch_resize_range, self.scheduler_config = batch_resize_range, scheduler_config
        self.lr_g_factor, self.use_ema = lr_g_factor, use_ema
        self.quantize = VectorQuantizer(
            n_embed, embed_dim, beta=beta, remap=remap, sane_index_shape=sane_index_shape, legacy=legacy
        )
        self._add_convolutions(moments=1)
        self._finish(colorize_nlabels, monitor, ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, embed_dim, h, w], before the codebook."""
        self._check(x)
        return self.quant_conv(self.encoder(x))

    def encode_moments(self, x: Tensor) -> tuple[Tensor, None]:
        """The latent before the codebook, which is what LDM diffuses; no variance."""
        return self.encode_to_prequant(x), None

    def encode(self, x: Tensor) -> Quantized:
        """Images [B, C, S, S] in [-1, 1] -> their latents, quantised, with the codebook's loss and indices."""
        return self.quantize(self.encode_to_prequant(x))

    @override
    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z)

    def decode_code(self, indices: Tensor) -> Tensor:
        """Indices [B, h, w], as the codebook reports them, -> image."""
        return self.decode(self.quantize.get_codebook_entry(indices, (*indices.shape, self.embed_dim)))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """(reconstruction, quantised latent with its loss)."""
        quantized = self.quantize(self.encode_to_prequant(x))
        return self._decode(quantized.quant), quantized

    @property
    @override
    def figure_count(self) -> int:
        return self.quantize.re_embed

    def reconstruct(self, x: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """figures: how often each entry was chosen."""
        image, quantized = self(x)
        chosen = torch.bincount(quantized.indices.flatten(), minlength=self.figure_count)
        return Reconstruction(image, quantized.emb_loss, chosen)

    @override
    def report(self, figures: Tensor) -> dict[str, float]:
        return dict(zip(self.own_columns, codebook_usage(figures), strict=True))


class VQModelInterface(VQModel):
    """VQModel as LDM's diffusion models use it: encode stops before the codebook, decode begins with it."""

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, C, S, S] in [-1, 1] -> latents [B, D, s, s] before quantisation, which `decode` does."""
        return self.encode_to_prequant(x)

    @override
    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        return self._decode(z if force_not_quantize else self.quantize.entries(self.quantize.nearest(z)))


class IdentityFirstStage(Autoencoder):
    """Pixels as latents. vq_interface: `quantize` as LDM's has it, for code that calls it."""

    def __init__(self, in_channels: int = 3, vq_interface: bool = False):
        super().__init__()
        self.in_channels = self.embed_dim = in_channels
        self.downsampling, self.vq_interface = 1, vq_interface

    @override
    def encode_moments(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def encode(self, x: Tensor) -> Tensor:
        """Images are their own latents."""
        return x

    @override
    def decode(self, z: Tensor) -> Tensor:
        return z

    def quantize(self, x: Tensor) -> Any:
        """x itself; with `vq_interface` in the shape of a quantiser's answer, without loss and indices."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


def check_betas(values: Sequence[float]) -> tuple[float, float]:
    """Raises UserError where these are no betas of Adam."""
    numbers = isinstance(values, Sequence) and all(isinstance(v, (int, float)) and 0 <= v < 1 for v in values)
    if not numbers or len(values) != 2:
        raise UserError(f"adam_betas {values!r}: write two numbers from 0 up to 1, such as [0.5, 0.9]")
    return float(values[0]), float(values[1])
