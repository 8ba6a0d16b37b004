"""Image sets, label maps and palettes, read as a stream."""
