"""Flags and presets, checkpoints, processes, and what happens after each step of a run."""
