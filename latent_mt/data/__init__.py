"""Pairs of images (photo and label map, day and night), and what a YAML file's `data` section builds."""

from .configured import ImageData, PairData, StreamedData
from .latent_cache import LatentCache
from .layouts import open_pairs
from .pairs import PairSource, Side
from .shards.data import ShardData

__all__ = ["ImageData", "LatentCache", "PairData", "PairSource", "ShardData", "Side", "StreamedData", "open_pairs"]
