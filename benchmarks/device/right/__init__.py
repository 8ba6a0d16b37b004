"""Whether the device computes what the CPU computes in float64, to what the arithmetic allows."""
