"""A configuration turned into network, process and modalities; drawing, restoring and classifying with them."""
