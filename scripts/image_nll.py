"""python scripts/image_nll.py --model_path RUN ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.nll import console

if __name__ == "__main__":
    console()
