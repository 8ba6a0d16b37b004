"""How good captions are: tokens and whole texts that are right, and whether an image and its caption find each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEAREST = (1, 5)  # recall is among the so many likeliest


class Retrieval(NamedTuple):
    """Rank of what belongs to each of N, 1 is best, int64 [N]; different: how many texts there are to choose from."""

    caption_of_image: np.ndarray
    image_of_caption: np.ndarray
    different: int


def token_accuracy(ids: np.ndarray, best: np.ndarray, own: np.ndarray) -> float:
    """The share of the captions' own tokens, ends among them, that are the likeliest at their position. All [N, L]."""
    return float(((ids == best) & own).sum() / own.sum())


def exact_match(texts: Sequence[str], found: Sequence[str]) -> float:
    """The share of captions that are right from the first token to the last."""
    return float(np.mean([a == b for a, b in zip(texts, found, strict=True)]))


def retrieval(log_p: np.ndarray, texts: Sequence[str]) -> Retrieval:
    """log_p [N, N]: log p(caption n | image b) in row b; texts [N], of the captions.

    Among the captions of an image, and among the images of a caption, those of the same text count as the right one. An image's
    prior probability is taken to be the same for all, so that p(image | caption) is ranked by the same numbers.
    """
    names, number = np.unique(np.array(texts), return_inverse=True)
    same = number[:, None] == number
    right = np.diagonal(log_p)
    better = ~same & (log_p > right[:, None])
    ranks = 1 + _different(better, number)
    of_caption = (~same & (log_p > right[None, :])).sum(axis=0) + 1
    return Retrieval(ranks, of_caption, len(names))


def _different(better: np.ndarray, number: np.ndarray) -> np.ndarray:
    """How many different texts are marked in each row."""
    found = np.zeros((len(better), int(number.max()) + 1), dtype=bool)
    for column, text in enumerate(number):  # of captions, a few thousand
        found[:, text] |= better[:, column]
    return found.sum(axis=1)


def recall(ranks: np.ndarray, nearest: int) -> float:
    """The share of ranks of at most `nearest`."""
    return float((ranks <= nearest).mean())
