"""python scripts/image_restore.py --model_path RUN ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.restore import console

if __name__ == "__main__":
    console()
