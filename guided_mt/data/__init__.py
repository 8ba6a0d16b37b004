"""Images from a folder, archive, .npz or the built-in digits, as a training stream or as one tensor."""

from .dataset import StreamOrder, load_images
from .loader import MAX_WORKERS, Batch, ImageStream, check_workers
from .open import SOURCES, SourceKind, open_source
from .sides import Sides, open_sides
from .sources import ImageSource, UnknownClassError
from .sources.formats import MAX_PIXELS
from .transforms import center_crop_arr, random_crop_arr

__all__ = [
    "MAX_PIXELS",
    "MAX_WORKERS",
    "SOURCES",
    "Batch",
    "ImageSource",
    "ImageStream",
    "Sides",
    "SourceKind",
    "StreamOrder",
    "UnknownClassError",
    "center_crop_arr",
    "check_workers",
    "load_images",
    "open_sides",
    "open_source",
    "random_crop_arr",
]
