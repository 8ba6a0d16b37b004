"""Pairs of images (photo and label map, day and night), and what a YAML file's `data` section builds."""

from latent_mt.data.configured import ImageData, PairData, StreamedData
from latent_mt.data.latent_cache import LatentCache
from latent_mt.data.layouts import open_pairs
from latent_mt.data.pairs import PairSource, Side

__all__ = ["ImageData", "LatentCache", "PairData", "PairSource", "Side", "StreamedData", "open_pairs"]
