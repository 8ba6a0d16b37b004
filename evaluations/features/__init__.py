"""Inception by two backends, DINOv2, their weights, and what was made of a reference before."""
