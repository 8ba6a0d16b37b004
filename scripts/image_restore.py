"""python scripts/image_restore.py --model_path RUN ..."""

from guided_mt.commands.restore import console

if __name__ == "__main__":
    console()
