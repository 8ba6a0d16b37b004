"""python scripts/image_nll.py --model_path RUN ..."""

from guided_mt.commands.nll import console

if __name__ == "__main__":
    console()
