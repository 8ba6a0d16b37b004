"""Alignment of a denoiser's middle features with a frozen encoder's features of the clean image: encoders, projectors, the loss."""

from .encoders import FeatureEncoder as FeatureEncoder
from .encoders import efficientnet as efficientnet
from .projectors import ALIGNMENTS as ALIGNMENTS
from .projectors import misalignment as misalignment
