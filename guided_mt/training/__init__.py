"""Algorithm 2 and the training loops, for images with their modalities and for noisy classifiers."""
