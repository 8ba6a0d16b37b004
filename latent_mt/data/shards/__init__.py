"""Images with captions in .tar shards, at the scale of the web."""
