"""python scripts/subsets.py --model_path RUN"""

import _installed  # noqa: F401 - first

from reproduce.subsets import console

if __name__ == "__main__":
    console()
