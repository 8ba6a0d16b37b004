"""A caption: token ids where it is known, what the head says of each position where it is not (docs/method.md, section 10.10)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ...data import ImageSource
from ...data.captions import lines_of
from ...data.dataset import captions_of
from ...diffusion.random import SampleStreams
from ...errors import UserError, reason
from ...networks.caption_head import CaptionHead
from ...networks.multi_task import MultiTask
from ...runs.distributed import Processes
from ..base import Images, Modality
from ..tokens import CaptionTokens, rms
from .counted import say_what_is_cut
from .vocabulary import VOCABULARIES, Vocabulary

log = logging.getLogger("guided_mt")

ABSENT = -1  # every token of an image without a caption
_HELD = 2**20  # texts whose tokens stay in memory


class CaptionModality(Modality):
    """x is token ids int64 [B, L], its end behind the last token and up to L; where it is estimated, what the head said
    float [B, L, width], of which all that is asked for is made (`CaptionHead`).

    kind: of VOCABULARIES. length: L, and width: of the head. The vocabulary is the head's, and with it in every weights file.
    """

    has_spread = True
    reads_weights = True  # the vocabulary, and the embedded tokens

    def __init__(self, name: str, kind: str, length: int, width: int):
        super().__init__(name)
        self.kind, self.length, self.width = kind, length, width
        self.counted: list[str] | None = None  # the words of the training captions
        self.source: ImageSource | None = None
        self._held: dict[str, list[int]] = {}

    @property
    def head(self) -> CaptionHead:
        """The network's. Raises ValueError without one."""
        if self.network is None:
            raise ValueError(f"modality '{self.name}' has its vocabulary in a network: build it with one")
        return cast(CaptionHead, self.network.heads[self.name])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The head's, which it is given here where it has none yet: that of the captions seen in `prepare`.

        Raises UserError where there were none.
        """
        row, words = VOCABULARIES[self.kind], self.head.words.words()
        if row.split is not None and not words:
            if not self.counted:
                raise UserError(f"this model's '{self.name}' has no vocabulary yet: it was never trained on captions")
            self.head.words.set(self.counted)
            words = self.head.words.words()
        return row.make(words)

    @property
    def end(self) -> int:
        """The token behind a caption's last one."""
        return VOCABULARIES[self.kind].make([]).end

    # ------------------------------------------------------------ data

    @property
    @override
    def loads(self) -> bool:
        return True

    @override
    def prepare(self, images: ImageSource) -> None:
        """Raises UserError where none of the images has a caption."""
        found = say_what_is_cut(images, self.kind, self.length)
        self.source, self.counted = images, found.words
        self.partly |= found.missing > 0 or images.streams_captions or found.looked < len(images)

    @override
    def load(self, indices: np.ndarray) -> Tensor | None:
        """The tokens of the images' first captions [B, L]; all ABSENT for an image without."""
        return None if self.source is None else self.load_of(self.source, indices)

    @override
    def load_of(self, source: ImageSource, indices: np.ndarray) -> Tensor | None:
        return self.load_texts(captions_of(source, indices) or [""] * len(indices))

    @override
    def load_texts(self, captions: Sequence[str]) -> Tensor | None:
        rows = np.array([self._tokens(text) for text in captions], dtype=np.int64)
        return torch.from_numpy(rows.reshape(-1, self.length))

    def _tokens(self, text: str) -> list[int]:
        """L of them, of each text once."""
        if text not in self._held:
            if len(self._held) >= _HELD:
                self._held.clear()
            ids = self.vocabulary.ids(text)[: self.length]
            filled = [*ids, *[self.vocabulary.end] * (self.length - len(ids))]
            self._held[text] = filled if ids else [ABSENT] * self.length
        return self._held[text]

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        if self.name not in images.loaded:
            raise ValueError(f"modality '{self.name}' needs images with captions")
        return images.loaded[self.name].clamp(min=0)

    @override
    def present(self, images: Images) -> Tensor | None:
        if self.name in images.present:
            return images.present[self.name]
        return self.has(images.loaded[self.name]) if self.partly else None

    @override
    def has(self, loaded: Tensor) -> Tensor | None:
        return loaded[:, 0] >= 0

    # ------------------------------------------------------------ the law of a caption

    @override
    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        """Zeros, which the head's bias alone makes tokens of: about how frequent each is, whatever the position."""
        return torch.zeros(len(streams), self.length, self.width, device=streams.device)

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self.encode_partly(x) if x.is_floating_point() else super().encode(x)

    @torch.no_grad()
    def encode_partly(self, x: Tensor, known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """E of an estimate x [B, L, width], some of whose tokens are `known` as `CaptionHead.expected` has them."""
        tokens = cast(CaptionTokens, cast(MultiTask, self.network).context_in[self.name])
        return super().encode(self.head.expected(x, tokens.weight, self.end, known))

    @override
    def estimate(self, prediction: Tensor) -> Tensor:
        return prediction

    @override
    def loss(self, prediction: Tensor, x: Tensor) -> Tensor:
        """The mean over the caption's own tokens and its end."""
        own = self.own_tokens(x)
        return -(self.head.token_log_probs(prediction, x) * own).sum(dim=1) / own.sum(dim=1)

    @override
    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The sum over the caption's own tokens and its end: the law of a caption of at most L tokens."""
        return (self.head.token_log_probs(prediction, x) * self.own_tokens(x)).sum(dim=1)

    def own_tokens(self, x: Tensor) -> Tensor:
        """Which positions of ids [B, L] are the caption's, its first end included: 1 or 0, float32."""
        ended = x == self.end
        return (ended.long().cumsum(dim=1) - ended.long() == 0).float()

    @torch.no_grad()
    def encoding_spread(self, device: torch.device) -> Tensor:
        """Over 16 captions of one token each."""
        count = min(16, self.head.vocabulary.out_features)
        ids = torch.full((count, self.length), self.end, device=device)
        ids[:, 0] = torch.arange(count, device=device)
        encodings = self.encode(ids)
        return rms(encodings - encodings.mean(dim=0)).square().mean().sqrt()

    # ------------------------------------------------------------ reading and writing

    @override
    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        """A caption, or a .txt with one in each line."""
        where = f"--given {self.name}={text}"
        captions: Sequence[str] = [text]
        if text.endswith(".txt"):
            try:
                captions = lines_of(Path(text).expanduser().read_bytes())
            except OSError as error:
                raise UserError(f"{where}: can't be read ({reason(error)})") from None
        rows = []
        for caption in captions:
            unknown = self.vocabulary.unknown(caption)
            if unknown:
                raise UserError(f"{where}: this model's captions have no word {', '.join(unknown)}")
            ids = self.vocabulary.ids(caption)
            if len(ids) > self.length:
                log.warning("%s: has %d tokens, and is cut after %d", where, len(ids), self.length)
            rows.append(self._tokens(caption))
        if not rows or any(ABSENT in row for row in rows):
            raise UserError(f"{where}: a caption has no word; write one, or leave {self.name} open")
        return torch.tensor(rows)

    def texts(self, ids: Tensor) -> list[str]:
        """What tokens [B, L] say."""
        return [self.vocabulary.text(row) for row in ids.tolist()]

    @override
    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        """Texts [B]; of an estimate the likeliest token at each position."""
        return {self.name: np.array(self.texts(self.head.best(x)[0] if x.is_floating_point() else x))}

    @override
    def drawn(self, x: Tensor, streams: SampleStreams) -> dict[str, np.ndarray]:
        """A caption whose tokens are drawn each by itself, NAME_draw."""
        if not x.is_floating_point():
            return {}
        return {f"{self.name}_draw": np.array(self.texts(self.head.drawn(x, streams.uniform(self.length))))}


class RandomCaption(CaptionModality):
    """The caption of any image, drawn anew each time: appendix E.5's control for negative transfer."""

    table: Tensor | None = None  # int32 [N, L] of all captions that were seen, on the device of training

    @override
    def prepare(self, images: ImageSource) -> None:
        """Every image has one. Raises UserError where there are none to draw from."""
        super().prepare(images)
        self.partly = False

    @override
    def load(self, indices: np.ndarray) -> Tensor | None:
        return None

    @override
    def load_of(self, source: ImageSource, indices: np.ndarray) -> Tensor | None:
        return None

    @override
    def load_texts(self, captions: Sequence[str]) -> Tensor | None:
        return None

    @override
    def before_step(self, step: int, processes: Processes) -> None:
        if self.table is None:
            self.table = self._all_captions().to(processes.device)

    def _all_captions(self) -> Tensor:
        assert self.source is not None and self.source.captions is not None
        texts = (text for number in range(len(self.source)) for text in self.source.captions[number])
        rows = [row for text in texts if ABSENT not in (row := self._tokens(text))]
        return torch.tensor(rows, dtype=torch.int32)

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        if self.table is None:
            self.table = self._all_captions().to(streams.device)
        return self.table[streams.integers(len(self.table))].long()

    @override
    def present(self, images: Images) -> Tensor | None:
        return images.present.get(self.name)
