"""python scripts/classifier_sample.py --model_path RUN --classifier_path CLASSIFIER_RUN --classifier_scale 1.0 ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.classifier_sample import console

if __name__ == "__main__":
    console()
