"""One picture of what a trained model makes of every subset of what it can be given."""

from .picture import console, main

__all__ = ["console", "main"]
