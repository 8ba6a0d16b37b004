"""The demo: a small model of digits, masked digits and labels, trained and shown in minutes on two CPU cores."""

from .stages import console, main

__all__ = ["console", "main"]
