"""Whether the project is right, fast and waits for nothing on a device: the stages of benchmarks/gpu.py.

Its modules import the packages of this clone, installed or not.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: deterministic matrix products
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")  # what one process compiled, the others find
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
