"""Generation over the moving frame: a denoiser that reads like Algorithm 1, and samplers that ask it as often as they like.

denoiser      what is known at z_t: network, heads, unknown modalities, own head, guidance, clipping
samplers      the rules that walk from z_T to z_0, and their registry
multistep     DPM-Solver++ and UniPC, which remember what they were told before
algorithm1    `sample`: the whole of Algorithm 1
guidance      the gradient of a separate classifier
"""

from .algorithm1 import Sample, sample
from .denoiser import CONDITIONINGS, Denoiser, Estimate
from .registry import SAMPLERS
from .samplers import Sampler

__all__ = ["CONDITIONINGS", "SAMPLERS", "Denoiser", "Estimate", "Sample", "Sampler", "sample"]
