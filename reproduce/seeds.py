"""The seeds that an experiment is trained with."""

from __future__ import annotations

from guided_mt.errors import UserError


def training_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]. Raises UserError for others than whole numbers, and for repeated ones."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UserError(f"--seeds {text}: write different whole numbers, as in 0,1,2")
    return [int(word) for word in words]
