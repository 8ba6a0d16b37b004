"""What scripts/latent_*.py, scripts/autoencoder_train.py and their neighbours call."""
