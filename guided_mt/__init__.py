"""MT-Diffusion in pixel space: one diffusion model for images and a second kind of data (Chen et al., ICLR 2024)."""
