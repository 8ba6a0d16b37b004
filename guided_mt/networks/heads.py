"""Decoder heads D_i: what the network says of each modality."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.process import GaussianDiffusion
from .backbone import Backbone, read_last
from .classifier import EncoderUNetModel


class HeadInputs(NamedTuple):
    """What a head may read: all that the network knows of one forward pass."""

    last: Tensor  # (B, feature_channels, H', W'): input of the output block
    middle: Tensor  # (B, middle_channels, h, w): see `backbone.Features`
    z_t: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,), the network's timesteps, `GaussianDiffusion.model_timesteps`
    output: Tensor  # (B, C or 2C, H, W)
    embedding: Tensor | None = None  # (B, E): see `backbone.Features`


class ImageHead(nn.Module):
    """A module like the backbone's output (ADM: norm, SiLU, convolution; DiT: final layer) on the last features:
    [B, channels, H, W]."""

    def __init__(self, backbone: Backbone, channels: int = 3):
        super().__init__()
        self.out = backbone.make_output(channels)

    def forward(self, seen: HeadInputs) -> Tensor:
        """The prediction [B, output channels, H, W], float32."""
        return read_last(self.out, seen.last, seen.embedding)


class PooledHead(nn.Module):
    """The paper's M head, [B, size]: the middle features' mean, then one linear layer (docs/method.md, section 10.5)."""

    def __init__(self, backbone: Backbone, size: int):
        super().__init__()
        self.linear = nn.Linear(backbone.middle_channels, size)

    def forward(self, seen: HeadInputs) -> Tensor:
        """Logits [B, classes], float32."""
        with torch.autocast(seen.middle.device.type, enabled=False):
            return self.linear(seen.middle.mean(dim=(2, 3)))


ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}  # of PooledMLPHead


class PooledMLPHead(nn.Module):
    """As `PooledHead` with a hidden layer: for vectors, [B, size]. The paper's (appendix E.4) has hidden = 1024 and relu."""

    def __init__(self, backbone: Backbone, size: int, hidden: int = 256, activation: str = "silu"):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(backbone.middle_channels, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, size)
        )

    def forward(self, seen: HeadInputs) -> Tensor:
        """The predicted vector [B, size], float32."""
        with torch.autocast(seen.middle.device.type, enabled=False):
            return self.mlp(seen.middle.mean(dim=(2, 3)))


class ClassifierHead(nn.Module):
    """The paper's E head: ADM's noisy classifier on the predicted x_start, with t: logits [B, K].

    The prediction is read off z_t as it stands, frame included: the frame holds the label, which a head must not see.
    It is clipped to [-limit, limit], since at large t eps errors are blown up without bound.
    """

    of_state: Tensor  # [T]
    of_output: Tensor  # [T]

    def __init__(self, classifier: EncoderUNetModel, diffusion: GaussianDiffusion, limit: float = 1.0):
        super().__init__()
        self.classifier, self.limit = classifier, limit
        of_state, of_output = diffusion.xstart_coefficients()
        self.register_buffer("of_state", torch.from_numpy(of_state).float(), persistent=False)
        self.register_buffer("of_output", torch.from_numpy(of_output).float(), persistent=False)
        self.per_timestep = 1000.0 / diffusion.original_num_steps if diffusion.rescale_timesteps else 1.0

    def forward(self, seen: HeadInputs) -> Tensor:
        """Logits [B, classes] of the classifier for the z_0 that the network predicts, read off z_t as it stands."""
        t = (seen.timesteps / self.per_timestep).round().long()
        of_state, of_output = (table[t].view(-1, 1, 1, 1) for table in (self.of_state, self.of_output))
        pred_xstart = of_state * seen.z_t + of_output * seen.output[:, : seen.z_t.shape[1]]
        return self.classifier(pred_xstart.clamp(-self.limit, self.limit), seen.timesteps)


class VectorUnits(nn.Module):
    """The units of a vector modality: x = (v - mean) / scale, for vectors v [B, D] as their encoder makes them.

    mean [D], and one number as the scale: what is near in v is near in x (docs/method.md, section 10.9). encoder [32]: the
    SHA-256 of the encoder's weights, zeros until they were measured.
    """

    mean: Tensor
    scale: Tensor
    encoder: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("encoder", torch.zeros(32, dtype=torch.uint8))

    def to_x(self, vectors: Tensor) -> Tensor:
        """x [B, D] of the encoder's vectors [B, D]."""
        return (vectors - self.mean) / self.scale

    def to_vectors(self, x: Tensor) -> Tensor:
        """The encoder's vectors [B, D] that x [B, D] stands for."""
        return self.mean + self.scale * x

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the encoder that they were measured with; b"" before. Waits for the device."""
        found = bytes(self.encoder.tolist())
        return found if any(found) else b""

    def set(self, mean: Tensor, scale: Tensor, digest: bytes) -> None:
        """Take these: mean [D], scale 0-dim, digest 32 bytes."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.encoder.copy_(torch.tensor(list(digest), dtype=torch.uint8))


class HeadVariance(nn.Module):
    """v_t: the mean squared error of a continuous head at each timestep, tracked while training (docs/method.md, section 5.2).

    Two running sums per timestep, which forget with `decay` per sample seen there, so that early errors fade.
    """

    error_sum: Tensor  # [T]
    error_count: Tensor  # [T]

    def __init__(self, num_timesteps: int, decay: float = 0.98):
        super().__init__()
        self.decay = decay
        self.register_buffer("error_sum", torch.zeros(num_timesteps))
        self.register_buffer("error_count", torch.zeros(num_timesteps))

    @torch.no_grad()
    def sums(self, t: Tensor, rows: Tensor) -> Tensor:
        """Of samples at timesteps t [B] the sums at each timestep, [2, T].

        rows: [2, B], mean squared errors, and 1; both 0 for a sample that is left out.
        """
        return rows.new_zeros(2, len(self.error_sum)).index_add_(1, t, rows)

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Learn from the `sums` [2, T] of a step, over all processes."""
        errors, seen = sums
        forget = self.decay**seen
        self.error_sum.mul_(forget).add_(errors)
        self.error_count.mul_(forget).add_(seen)

    def value(self) -> Tensor:
        """v_t [T], smoothed over 1 % of the timesteps to each side (a single timestep is seen too rarely to stand alone).

        Raises ValueError before the first update.
        """
        if not self.error_count.any():
            raise ValueError("no head variance was tracked: the model has not been trained with this head")
        radius = max(1, len(self.error_sum) // 100)
        sums, counts = self.error_sum.double(), self.error_count.double()
        window = torch.ones(1, 1, 2 * radius + 1, dtype=torch.float64, device=sums.device)
        while True:
            smooth = torch.nn.functional.conv1d(
                torch.stack([sums, counts])[:, None], window, padding=window.shape[-1] // 2
            )
            if (smooth[1] > 0).all():
                return (smooth[0] / smooth[1]).clamp(min=1e-6).flatten().float()
            window = torch.ones(1, 1, 2 * window.shape[-1] + 1, dtype=torch.float64, device=sums.device)
