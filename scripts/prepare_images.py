"""python scripts/prepare_images.py SRC OUT.zip --size 64"""

import _installed  # noqa: F401 - first

from guided_mt.commands.prepare import console

if __name__ == "__main__":
    console()
