"""U-Net, noisy classifier and decoder heads, and the multi-task part that stands over any backbone."""
