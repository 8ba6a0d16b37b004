"""The second kinds of data. A modality says where its data come from, where they start, how they enter Z and what is lost.

A new one is a class here (or anywhere), a head in `networks/heads.py` and a row in `registry.TASKS` (docs/new_modality.md).
"""

from .base import Gaussian, Images, Modality
from .captions import CaptionModality, RandomCaption
from .encoded import EncodedVector
from .image import ImageModality, MaskedImage, PairedImage, patch_mask
from .label import LabelModality, RandomLabel
from .roles import Roles
from .space import Pixels, Space
from .tokens import CaptionTokens, LabelTokens, VectorTokens
from .vector import VectorModality

__all__ = [
    "CaptionModality",
    "CaptionTokens",
    "EncodedVector",
    "Gaussian",
    "ImageModality",
    "Images",
    "LabelModality",
    "LabelTokens",
    "MaskedImage",
    "Modality",
    "PairedImage",
    "Pixels",
    "RandomCaption",
    "RandomLabel",
    "Roles",
    "Space",
    "VectorModality",
    "VectorTokens",
    "patch_mask",
]
