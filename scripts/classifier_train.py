"""mpiexec -n 8 python scripts/classifier_train.py --data_dir imagenet/train --val_data_dir imagenet/val --image_size 128 ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.classifier_train import console

if __name__ == "__main__":
    console()
