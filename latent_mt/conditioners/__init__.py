"""LDM's conditioning stages: what turns a class, a text or an image-like condition into what the U-Net reads.

Keyword arguments and state-dict keys as in latent-diffusion. Each stage is a callable; `encode` is LDM's name for the call.
"""

from .classes import ClassEmbedder
from .clip import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from .images import SpatialRescaler
from .text import BERTEmbedder, BERTTokenizer, TextTransformer, TransformerEmbedder

__all__ = [
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder",
    "SpatialRescaler",
    "TextTransformer",
    "TransformerEmbedder",
]
