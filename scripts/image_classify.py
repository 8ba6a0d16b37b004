"""python scripts/image_classify.py --model_path RUN --data_dir ..., or --classifier_path RUN."""

import _installed  # noqa: F401 - first

from reproduce.classify import console

if __name__ == "__main__":
    console()
