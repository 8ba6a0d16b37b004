"""What is known of a source's captions once they were read through: their words, their lengths, and which are missing."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from dataclasses import dataclass, field

from ...data import ImageSource
from ...errors import UserError
from .vocabulary import VOCABULARIES

log = logging.getLogger("guided_mt")

LOOKED_AT = 2**20  # of more images, so many are looked at, evenly spread
_SHOWN = 5  # images in messages


@dataclass
class Counted:
    """words: the most frequent first, equally frequent ones by the alphabet. lengths {tokens: captions of so many}. missing: how
    many images have no caption with a word, and the first ones' names. captions: how many there are in all, of the
    images `looked` at."""

    words: list[str] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    missing: int = 0
    shown: list[str] = field(default_factory=list)
    captions: int = 0
    looked: int = 0

    def longer_than(self, length: int) -> int:
        """How many captions have more tokens than that."""
        return sum(count for tokens, count in self.lengths.items() if tokens > length)


_counted: weakref.WeakKeyDictionary[ImageSource, dict[str, Counted]] = weakref.WeakKeyDictionary()


def count_captions(source: ImageSource, kind: str) -> Counted:
    """Read all captions of a source, once. Raises UserError where there are none."""
    if source.captions is None:
        raise UserError(f"{source.path}: has no captions; say where they are (--caption_file, data.params.captions)")
    known = _counted.setdefault(source, {})
    if kind not in known:
        known[kind] = _count(source, kind)
    return known[kind]


def _count(source: ImageSource, kind: str) -> Counted:
    row, found = VOCABULARIES[kind], Counted()
    split = row.split or row.make([]).ids
    words: Counter[str] = Counter()
    assert source.captions is not None
    for number in range(0, len(source), -(-len(source) // LOOKED_AT)):
        found.looked += 1
        tokens = [each for text in source.captions[number] if (each := split(text))]
        for each in tokens:
            found.lengths[len(each)] += 1
            if row.split is not None:
                words.update(each)  # type: ignore[arg-type]  # of texts
        found.captions += len(tokens)
        if not tokens:
            found.missing += 1
            found.shown += [source.name(number)] if len(found.shown) < _SHOWN else []
    if not found.captions:
        raise UserError(f"{source.path}: none of the {found.looked} images has a caption with a word in it")
    found.words = sorted(words, key=lambda word: (-words[word], word))
    return found


def say_what_is_cut(source: ImageSource, kind: str, length: int) -> Counted:
    """What was counted, after a line for captions that are longer than `length`, and one for images without any."""
    found = count_captions(source, kind)
    longer = found.longer_than(length)
    if longer:
        text = "%s: %d of %d captions have more than %d tokens, and are cut there (--caption_length)"
        log.warning(text, source.path, longer, found.captions, length)
    if found.missing:
        text = "%s: %d of %d images have no caption and count as absent: %s%s"
        more = ", ..." if found.missing > len(found.shown) else ""
        log.warning(text, source.path, found.missing, found.looked, ", ".join(found.shown), more)
    return found
