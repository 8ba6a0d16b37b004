"""LatentMTDiffusion: guided_mt's diffusion, losses and network on latents, and drawing from it."""
