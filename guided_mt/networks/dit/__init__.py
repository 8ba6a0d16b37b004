"""A diffusion transformer (Peebles and Xie 2023) as a backbone."""

from .network import CONTEXTS, DiT

__all__ = ["CONTEXTS", "DiT"]
