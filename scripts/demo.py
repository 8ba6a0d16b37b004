"""python scripts/demo.py [--run runs/demo] [--steps 1600] [--processes 2]"""

import _installed  # noqa: F401 - first

from reproduce.demo import console

if __name__ == "__main__":
    console()
