"""Which task helps or hurts which (appendix E.5): models of an image with one task more, or several, against the image alone."""

from .experiment import console, main

__all__ = ["console", "main"]
