"""Latent-diffusion's autoencoders, and the losses that train them."""
