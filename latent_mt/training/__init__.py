"""Training of first stages and of latent models, as Lightning modules."""
