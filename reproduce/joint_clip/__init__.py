"""The paper's joint model of image and CLIP representation (appendix E.4) at a small scale, on pictures with captions."""

from .experiment import console, main

__all__ = ["console", "main"]
