"""python scripts/compare.py [--run runs/compare] [--steps 500] [--seeds 0,1,2] [--rows label-m,none] [--conditioning]"""

import _installed  # noqa: F401 - first

from reproduce.compare import console

if __name__ == "__main__":
    console()
