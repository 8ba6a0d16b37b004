"""Images from a folder, archive, .npz or the built-in digits, as a training stream or as one tensor."""

from .dataset import StreamOrder, load_images
from .loader import Batch, ImageStream
from .open import open_source
from .sources import ImageSource, UnknownClassError
from .transforms import center_crop_arr, random_crop_arr

__all__ = [
    "Batch",
    "ImageSource",
    "ImageStream",
    "StreamOrder",
    "UnknownClassError",
    "center_crop_arr",
    "load_images",
    "open_source",
    "random_crop_arr",
]
