"""Images with a label and a caption whose best network is known in closed form, whatever is given: every component of a mixture
carries both.

z_t = a z_0 + sum_i b_i E_i(x_i) + s eps over what stands in the frame. For each component that is a Gaussian, so p(component |
z_t) is known, and with it the head of the label, that of the caption (position by position, given that the caption has not ended
before), and E[eps | z_t].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mixture import LabelledMixture
from torch import Tensor, nn

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.modalities import LabelModality, Modality
from guided_mt.modalities.captions import CaptionModality
from guided_mt.modalities.tokens import CaptionTokens
from guided_mt.networks.caption_head import CaptionHead

END = 0  # of words
EMPTY = -1e4  # a logit of what no component says


class JointMixture:
    """labels, captions: of each component, its class and its words, numbers from 1 on. Weights of the
    frame are the same for both modalities, so that their encodings add up."""

    def __init__(
        self,
        shape: Sequence[int],
        probabilities: Sequence[float],
        labels: Sequence[int],
        captions: Sequence[Sequence[int]],
        *,
        apart: float,
    ):
        self.shape, self.labels = tuple(shape), torch.tensor(labels)
        self.length = max(map(len, captions)) + 1
        rows = [[*words, *[END] * (self.length - len(words))] for words in captions]
        self.captions = torch.tensor(rows)
        self.base = LabelledMixture.make(shape, probabilities, seed=0, apart=apart)
        draws = torch.Generator().manual_seed(3)
        size, classes = int(self.captions.max()) + 1, int(self.labels.max()) + 1
        self.of_label = torch.randn(classes, *shape, generator=draws, dtype=torch.float64)
        self.tokens = torch.randn(size, size, generator=draws, dtype=torch.float64)
        # E(caption) is linear in the embedded tokens, so that E of an expectation is the expectation of E.
        self.of_tokens = (
            torch.randn(self.length, size, *shape, generator=draws, dtype=torch.float64) / (self.length * size) ** 0.5
        )
        self.tables = {
            "label": self.of_label[self.labels],
            "caption": self.encode_caption(self.captions),
        }

    def __len__(self) -> int:
        return len(self.labels)

    # ------------------------------------------------------------ the package's own modalities

    def encode_label(self, x: Tensor) -> Tensor:
        """Ids [B] or probabilities [B, K] -> [B, C, H, W]."""
        p = x.double() if x.is_floating_point() else F.one_hot(x, len(self.of_label)).double()
        return torch.einsum("bk,k...->b...", p, self.of_label)

    def encode_caption(self, x: Tensor) -> Tensor:
        """Ids [B, L], or embedded tokens [B, L, D] as `CaptionHead.expected` has them -> [B, C, H, W]."""
        embedded = x.double() if x.is_floating_point() else self.tokens[x]
        return torch.einsum("bld,ld...->b...", embedded, self.of_tokens)

    def modalities(self) -> dict[str, Modality]:
        """The package's own, with these encoders; what the caption's head says of a position are its logits themselves."""
        label = LabelModality(len(self.of_label))
        label.encoder = self.encode_label
        size = len(self.tokens)
        head = CaptionHead(SimpleNamespace(middle_channels=8), size, self.length, width=size)
        head.vocabulary = nn.Identity()
        head.vocabulary.out_features = size
        head.logits = lambda said: said
        tokens = CaptionTokens(size, self.length, size)
        tokens.weight = nn.Parameter(self.tokens, requires_grad=False)
        caption = CaptionModality("caption", "words", self.length, size)
        caption.network = SimpleNamespace(heads={"caption": head}, context_in={"caption": tokens})
        caption.encoder = self.encode_caption
        return {"label": label, "caption": caption}

    # ------------------------------------------------------------ the best network

    def components(self, z_t: Tensor, abar: Tensor, b: Tensor, framed: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `LabelledMixture.components`, with the encodings of `framed` in the frame."""
        zero = torch.zeros(len(self), *self.shape, dtype=torch.float64)
        table = sum((self.tables[name] for name in framed), zero)
        own = LabelledMixture(self.base.probabilities, self.base.means, self.base.covs, table)
        return own.components(z_t, abar, b)

    def carrying(self, given: dict[str, Tensor]) -> Tensor:
        """Which components carry what is given: bool [B, K], or [1, K] of nothing."""
        found = torch.ones(1, len(self), dtype=torch.bool)
        if "label" in given:
            found = found & (given["label"][:, None] == self.labels)
        if "caption" in given:
            found = found & (given["caption"][:, None] == self.captions).all(-1)
        return found

    def caption_logits(self, log_joint: Tensor) -> Tensor:
        """[B, L, V]: at each position the log of what the components weigh that go on there, by the token they have."""
        ended = (self.captions == END).long()
        goes_on = ended.cumsum(dim=1) - ended == 0  # (K, L)
        is_token = (F.one_hot(self.captions, len(self.tokens)) * goes_on[..., None]).bool()  # (K, L, V)
        held = log_joint[:, :, None, None].masked_fill(~is_token, EMPTY)
        return held.logsumexp(dim=1)

    def network(self, diffusion: GaussianDiffusion) -> Callable:
        """The best network for the full process: what is given has left the frame, what is not stands in it."""
        abars = torch.from_numpy(diffusion.alphas_cumprod)
        bs = torch.from_numpy(diffusion.aggregation.coefficients["label"])

        def network(z_t: Tensor, t: Tensor, modalities: dict[str, Tensor]) -> ModelOutput:
            framed = [name for name in self.tables if name not in modalities]
            log_joint, eps = self.components(z_t, abars[t], bs[t], framed)
            log_joint = log_joint.log_softmax(-1).masked_fill(~self.carrying(modalities), EMPTY)
            mean = (log_joint.softmax(-1)[..., None] * eps).flatten(1) @ self.base.into.T
            of_label = log_joint[:, :, None].masked_fill(~F.one_hot(self.labels).bool(), EMPTY).logsumexp(dim=1)
            said = {"label": of_label, "caption": self.caption_logits(log_joint)}
            return ModelOutput(mean.view(z_t.shape), said)

        return network

    def nearest(self, z_0: Tensor) -> Tensor:
        """The most probable component of clean data [B]."""
        return self.base.nearest(z_0)
