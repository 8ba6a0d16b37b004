"""Latent-diffusion's YAML files and checkpoints, and a run folder under Lightning."""
