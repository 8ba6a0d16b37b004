"""Images from a folder, archive, .npz or the built-in digits, as a training stream or as one tensor."""

from guided_mt.data.dataset import StreamOrder, load_images
from guided_mt.data.loader import Batch, ImageStream
from guided_mt.data.open import open_source
from guided_mt.data.sources import ImageSource
from guided_mt.data.transforms import center_crop_arr, random_crop_arr

__all__ = [
    "Batch",
    "ImageSource",
    "ImageStream",
    "StreamOrder",
    "center_crop_arr",
    "load_images",
    "open_source",
    "random_crop_arr",
]
