"""python scripts/image_sample.py --model_path RUN ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.sample import console

if __name__ == "__main__":
    console()
