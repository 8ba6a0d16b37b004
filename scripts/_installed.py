"""What every script imports first: the packages of this clone are found, and what is not installed is said in one line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluations.installed import PACKAGES, run_as_script

sys.path.pop(0)
run_as_script((*PACKAGES, "omegaconf", "blobfile", "safetensors", "tensorboard", "sklearn"))
