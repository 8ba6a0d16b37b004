"""Whether the project is right, fast and waits for nothing on a device: the stages of benchmarks/gpu.py."""
