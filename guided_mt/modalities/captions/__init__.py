"""Captions: texts of a few tokens, as a modality (docs/method.md, section 10.10)."""

from .modality import CaptionModality, RandomCaption
from .vocabulary import VOCABULARIES

__all__ = ["VOCABULARIES", "CaptionModality", "RandomCaption"]
