"""What images are read from: folders, archives, arrays, several of them as one; and the rules that all of them share."""

from .base import ArraySource, FileSource, ImageSource
from .classes import UnknownClassError, check_classes, class_places
from .formats import IMAGE_SUFFIXES
from .joined import Joined

__all__ = [
    "IMAGE_SUFFIXES",
    "ArraySource",
    "FileSource",
    "ImageSource",
    "Joined",
    "UnknownClassError",
    "check_classes",
    "class_places",
]
