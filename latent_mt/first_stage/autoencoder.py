"""LDM's first stages (Rombach et al. 2022): its constructor keywords, state-dict names and numerics, as plain modules.

Images are float in [-1, 1]. How they are trained is in autoencoder_training.py and losses.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_mt.errors import UserError, nearest
from guided_mt.runs import checkpoint

from ..runs import ldm_checkpoint
from ..runs.ldm_checkpoint import TRAINING_ONLY
from .quantize import Quantized, VectorQuantizer, widened

NORM_GROUPS, NORM_EPS = 32, 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
ADAM_BETAS = (0.5, 0.9)
ATTENTION = ("vanilla", "none")
log = logging.getLogger("latent_mt")


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DDConfig:
    """LDM's `ddconfig`: sizes of encoder and decoder. resolution only decides where attention stands.

    norm_groups (ours): LDM's group norms have 32 groups, which with 32 channels are one channel each: they then remove every
    channel's mean over the image, and with it the image's colour. LDM's own 128 channels make groups of four.
    """

    ch: int
    out_ch: int
    num_res_blocks: int
    in_channels: int
    resolution: int
    z_channels: int
    ch_mult: Sequence[int] = (1, 2, 4, 8)
    attn_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True
    double_z: bool = True
    use_linear_attn: bool = False
    attn_type: str = "vanilla"
    tanh_out: bool = False
    give_pre_end: bool = False
    norm_groups: int = NORM_GROUPS

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


def read_ddconfig(values: Mapping[str, Any] | DDConfig) -> DDConfig:
    """`ddconfig` of a YAML file, checked. Raises UserError naming the key."""
    if isinstance(values, DDConfig):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"ddconfig must hold 'key: value' lines, not {values!r}")
    fields = dataclasses.fields(DDConfig)
    names = [entry.name for entry in fields]
    for key in values:
        if key not in names:
            raise UserError(
                f"ddconfig.{key}: there is no such key{nearest(str(key), names)}; known: {', '.join(names)}"
            )
    for entry in fields:
        if entry.name not in values and entry.default is dataclasses.MISSING:
            raise UserError(f"ddconfig.{entry.name} is missing")
    checked = {key: _checked(key, value) for key, value in values.items()}
    config = DDConfig(**checked)
    if config.use_linear_attn or config.attn_type not in ATTENTION:
        kind = "use_linear_attn True" if config.use_linear_attn else f"attn_type '{config.attn_type}'"
        raise UserError(f"ddconfig.{kind}: the kinds of attention are {' and '.join(ATTENTION)}")
    if config.give_pre_end:
        raise UserError("ddconfig.give_pre_end True: the decoder always ends in an image; leave the key out")
    return config


def _checked(key: str, value: Any) -> Any:
    """A value of ddconfig as the type of its field."""
    default = {entry.name: entry.default for entry in dataclasses.fields(DDConfig)}[key]
    if key in ("ch_mult", "attn_resolutions"):
        whole = isinstance(value, Sequence) and all(type(item) is int and item > 0 for item in value)
        if not whole or (key == "ch_mult" and not len(value)):
            raise UserError(f"ddconfig.{key} {value!r}: write a list of whole numbers such as [1, 2, 4]")
        return tuple(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"ddconfig.{key} {value!r}: write true or false")
    elif key == "dropout":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"ddconfig.dropout {value!r}: write a share from 0 up to 1")
    elif not isinstance(default, str) and (type(value) is not int or value < 1):
        raise UserError(f"ddconfig.{key} {value!r}: write a whole number of 1 or more")
    return value


def check_betas(values: Sequence[float]) -> tuple[float, float]:
    """Raises UserError where these are no betas of Adam."""
    numbers = isinstance(values, Sequence) and all(isinstance(v, (int, float)) and 0 <= v < 1 for v in values)
    if not numbers or len(values) != 2:
        raise UserError(f"adam_betas {values!r}: write two numbers from 0 up to 1, such as [0.5, 0.9]")
    return float(values[0]), float(values[1])


# --- layers ----------------------------------------------------------------------------------------------------------


def normalize(channels: int, groups: int) -> nn.GroupNorm:
    """LDM's `Normalize`: group norm, eps 1e-6."""
    if channels % groups:
        raise UserError(
            f"ddconfig: a layer would have {channels} channels, but group norm needs a multiple of {groups}: change ch or ch_mult"
        )
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResnetBlock(nn.Module):
    """[B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, config: DDConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = normalize(in_channels, config.norm_groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = normalize(out_channels, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over positions with one head of all channels."""

    def __init__(self, channels: int, groups: int = NORM_GROUPS):
        super().__init__()
        self.norm = normalize(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H W, C)
        return x + self.proj_out(attended[:, 0].transpose(1, 2).reshape(x.shape))


def make_attention(config: DDConfig, channels: int) -> nn.Module:
    return AttnBlock(channels, config.norm_groups) if config.attn_type == "vanilla" else nn.Identity()


class Downsample(nn.Module):
    """Half the size: a strided convolution padded at right and bottom only, or the mean of each 2x2."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Twice the size by repetition, and a convolution `with_conv`."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Level(nn.Module):
    """What encoder and decoder do at one resolution: blocks, each followed by attention where there is any."""

    def __init__(self, config: DDConfig, channels: int, out_channels: int, blocks: int, resolution: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(config, out_channels if i else channels, out_channels) for i in range(blocks)
        )
        attended = blocks if resolution in config.attn_resolutions else 0
        self.attn = nn.ModuleList(make_attention(config, out_channels) for _ in range(attended))

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    def __init__(self, config: DDConfig, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = make_attention(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, z_channels or 2 z_channels (double_z), H / f, W / f]."""

    def __init__(self, config: DDConfig):
        super().__init__()
        self.conv_in = conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        channels, resolution = config.ch, config.resolution
        for i, mult in enumerate(config.ch_mult):
            level = Level(config, channels, config.ch * mult, config.num_res_blocks, resolution)
            channels = config.ch * mult
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(channels, config.resamp_with_conv)
                resolution //= 2
            self.down.append(level)
        self.mid = Middle(config, channels)
        self.norm_out = normalize(channels, config.norm_groups)
        self.conv_out = conv3x3(channels, config.z_channels * (2 if config.double_z else 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, out_ch, f h, f w]."""

    def __init__(self, config: DDConfig):
        super().__init__()
        channels, resolution = config.ch * config.ch_mult[-1], config.resolution // config.downsampling
        self.tanh_out = config.tanh_out
        self.conv_in = conv3x3(config.z_channels, channels)
        self.mid = Middle(config, channels)
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(config.ch_mult))):
            level = Level(config, channels, config.ch * mult, config.num_res_blocks + 1, resolution)
            channels = config.ch * mult
            if i:
                level.upsample = Upsample(channels, config.resamp_with_conv)
                resolution *= 2
            self.up.insert(0, level)  # numbered as the encoder's
        self.norm_out = normalize(channels, config.norm_groups)
        self.conv_out = conv3x3(channels, config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h


# --- first stages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior of a latent: mean and logvar [B, C, h, w], logvar within -30..20."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """noise: standard normal of the mean's shape; None draws it from torch's generator."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal in nats, summed over the latent: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(dim=1)

    def nll(self, sample: Tensor) -> Tensor:
        """-log density of `sample` in nats: [B]."""
        squared = (sample - self.mean).square() / self.logvar.exp()
        return 0.5 * (math.log(2.0 * math.pi) + self.logvar + squared).flatten(1).sum(dim=1)


class Autoencoder(nn.Module):
    """What every first stage has: embed_dim latent channels, `downsampling` pixels per latent position and side, in_channels.

    Where `ckpt_path` is given its weights are loaded: a .ckpt, .pt or .safetensors file, or a run or checkpoint folder of
    autoencoder_train.py (the averaged weights). Entries that begin with one of `ignore_keys` are left out. Raises UserError.
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
    """Encoder, decoder and the two 1x1 convolutions around the latent: what AutoencoderKL and VQModel share."""

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
            load_first_stage(self, ckpt_path, ignore_keys)

    @property
    def last_layer(self) -> nn.Parameter:
        """Where LDM compares the gradients of its losses."""
        return self.decoder.conv_out.weight

    def get_last_layer(self) -> nn.Parameter:
        return self.last_layer

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

    lossconfig, and scheduler_config and adam_betas (ours; LDM has the one for VQModel alone and the other fixed), are kept for
    training; monitor and image_key are LDM's and without meaning here.
    """

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

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        mean, logvar = widened(self.quant_conv(self.encoder(x))).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*self.encode_moments(x))

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z)

    def forward(
        self, x: Tensor, sample_posterior: bool = True, noise: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """(reconstruction of a draw from the posterior, or of its mode; posterior). noise: see DiagonalGaussian.sample."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise) if sample_posterior else posterior.mode()), posterior


class VQModel(ConvolutionalAutoencoder):
    """A latent of codebook entries. beta, legacy: see VectorQuantizer, whose defaults are what LDM's configurations get.

    use_ema, lr_g_factor, batch_resize_range, scheduler_config, adam_betas and lossconfig are kept for training.
    """

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
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z)

    def decode_code(self, indices: Tensor) -> Tensor:
        """Indices [B, h, w], as the codebook reports them, -> image."""
        return self.decode(self.quantize.get_codebook_entry(indices, (*indices.shape, self.embed_dim)))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """(reconstruction, quantised latent with its loss)."""
        quantized = self.quantize(self.encode_to_prequant(x))
        return self._decode(quantized.quant), quantized


class VQModelInterface(VQModel):
    """VQModel as LDM's diffusion models use it: encode stops before the codebook, decode begins with it."""

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_to_prequant(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        return self._decode(z if force_not_quantize else self.quantize.entries(self.quantize.nearest(z)))


class IdentityFirstStage(Autoencoder):
    """Pixels as latents. vq_interface: `quantize` as LDM's has it, for code that calls it."""

    def __init__(self, in_channels: int = 3, vq_interface: bool = False):
        super().__init__()
        self.in_channels = self.embed_dim = in_channels
        self.downsampling, self.vq_interface = 1, vq_interface

    def encode_moments(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def quantize(self, x: Tensor):
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        return x


# --- weights ---------------------------------------------------------------------------------------------------------


def load_first_stage(model: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
    """Load LDM's autoencoder checkpoint, or one of ours, into `model` (see Autoencoder). Raises UserError for entries that
    are missing, unknown or of another shape; what only training needs is left out and named in the log."""
    _refuse_other_ddconfig(model, checkpoint.find_weights(path, flag="ckpt_path"))
    state = read_state_dict(path)
    ignored = [key for key in state if key.startswith(tuple(ignore_keys))]
    left_out = [key for key in state if key.startswith(TRAINING_ONLY) and key not in ignored]
    dropped = {*ignored, *left_out}
    load_entries(model, {key: value for key, value in state.items() if key not in dropped}, path, ignore_keys)
    if dropped:
        kinds = sorted({".".join(key.split(".")[:2]) for key in dropped})
        log.info("%s: %d entries not loaded into the autoencoder: %s", path, len(dropped), ", ".join(kinds))


def _refuse_other_ddconfig(model: nn.Module, file: Path) -> None:
    """UserError where the run that `file` is from had another network: not every difference shows in the entries' shapes."""
    saved: Any = checkpoint.read_config(file) or {}
    for key in ("model", "params", "ddconfig"):
        saved = saved.get(key) if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or not isinstance(model, ConvolutionalAutoencoder):
        return
    own, theirs = dataclasses.asdict(model.ddconfig), dataclasses.asdict(read_ddconfig(saved))
    for free in ("dropout", "resolution"):
        del own[free]
    different = checkpoint.differing_keys(theirs, own)
    if different:
        raise UserError(f"ckpt_path {file}: was trained with another ddconfig: {', '.join(different)}; repeat it here")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The entries of an autoencoder's checkpoint file or folder. Raises UserError."""
    return ldm_checkpoint.read_state_dict(checkpoint.find_weights(path, flag="ckpt_path"), "autoencoder")[0]


def load_entries(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, may_lack: Sequence[str] = ()) -> None:
    """Load `state` of `path` into `model`; entries that begin with one of `may_lack` may be missing. Raises UserError."""
    what = checkpoint.difference(state, model.state_dict(), optional=lambda key: key.startswith(tuple(may_lack)))
    if what:
        raise UserError(f"ckpt_path {path}: another {type(model).__name__}: {what}; compare ddconfig and embed_dim")
    model.load_state_dict(state, strict=False)
