"""Between texts and token ids: the words of the training captions, or CLIP's byte pairs; a table with a row for each."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...errors import nearest
from ...networks import clip
from ...networks.caption_head import WORD_BYTES

# Letters and digits with apostrophes and hyphens inside; any other sign that is no space, by itself.
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_CLOSING = re.compile(r" ([.,;:!?)\]}])")
END, UNKNOWN = "<pad>", "<unknown>"


class Vocabulary(Protocol):
    """end: the token behind a caption's last one, and all that follow."""

    end: int

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without an end; [] where it has no word."""

    def text(self, ids: Iterable[int]) -> str:
        """What tokens say, up to the end."""

    def unknown(self, text: str) -> list[str]:
        """The words of a text that have no token, each with the nearest that has one."""


def words_of(text: str) -> list[str]:
    """The words and signs of a text, in small letters, each of at most WORD_BYTES bytes; [] where there are only signs."""
    found = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    if not any(word[0].isalnum() for word in found):
        return []
    return [word.encode()[:WORD_BYTES].decode("utf-8", "ignore") for word in found]


class Words:
    """Token 0 is END, 1 is UNKNOWN, and 2 + k is word number k."""

    end = 0

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.number = {word: 2 + k for k, word in enumerate(words)}

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return [self.number.get(word, 1) for word in words_of(text)]

    def text(self, ids: Iterable[int]) -> str:
        """The words with spaces between them."""
        found = []
        for token in ids:
            if token == self.end:
                break
            found.append(self.words[token - 2] if 1 < token < 2 + len(self.words) else UNKNOWN)
        return _CLOSING.sub(r"\1", " ".join(found))

    def unknown(self, text: str) -> list[str]:
        """The words that are not among these."""
        return [f"'{word}'{nearest(word, self.words)}" for word in words_of(text) if word not in self.number]


class BytePairs:
    """CLIP's, whose token of a text's end is the end here. Raises UserError where open_clip is missing."""

    end = clip.END

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return clip.encode(text)

    def text(self, ids: Iterable[int]) -> str:
        """What they spell."""
        found: list[int] = []
        for token in ids:
            if token == self.end:
                break
            found += [token] if token != clip.START else []
        return clip.decode(found)

    def unknown(self, text: str) -> list[str]:
        """Of bytes everything can be made."""
        return []


@dataclass(frozen=True)
class VocabularyKind:
    """A row of VOCABULARIES. make(words): the vocabulary of these words; split(text): what they are counted of, None where they
    are known beforehand. size, length: V and L where neither the flags nor the data say them. most_words: those that are
    counted at most; most: the largest L that is chosen by the data."""

    make: Callable[[Sequence[str]], Vocabulary]
    size: int
    length: int
    most: int
    split: Callable[[str], list[str]] | None = None
    most_words: int = 10_000


VOCABULARIES: dict[str, VocabularyKind] = {
    "words": VocabularyKind(Words, size=1000, length=16, most=32, split=words_of),
    "bpe": VocabularyKind(lambda words: BytePairs(), size=clip.SIZE, length=clip.LENGTH, most=clip.LENGTH),
}
