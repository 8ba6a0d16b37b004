"""python scripts/prepare_images.py SRC OUT.zip --size 64"""

from guided_mt.commands.prepare import console

if __name__ == "__main__":
    console()
