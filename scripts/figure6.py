"""python scripts/figure6.py --joint RUN --data_dir TRAIN --val_data_dir HELD_OUT --out DIR --iterations 2000"""

import _installed  # noqa: F401 - first

from reproduce.figure6 import console

if __name__ == "__main__":
    console()
