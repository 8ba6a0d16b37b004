"""The samplers by the names of `--sampler`."""

from __future__ import annotations

from .multistep import DPMSolverPP, SDEDPMSolverPP, UniPC, UniPC3
from .samplers import DDIM, Ancestral, Heun, Sampler

SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "dpm++": DPMSolverPP,
    "sde-dpm++": SDEDPMSolverPP,
    "unipc": UniPC,
    "unipc3": UniPC3,
    "heun": Heun,
}
