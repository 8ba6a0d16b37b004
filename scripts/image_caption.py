"""python scripts/image_caption.py --model_path RUN --data_dir ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.caption import console

if __name__ == "__main__":
    console()
