"""mpiexec -n 8 python scripts/image_train.py --mt_task masked --data_dir imagenet ..."""

import _installed  # noqa: F401 - first

from guided_mt.commands.train import console

if __name__ == "__main__":
    console()
