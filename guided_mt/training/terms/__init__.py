"""Terms of the loss beside the modalities', and how the gradients of all terms agree."""
