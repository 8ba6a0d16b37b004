"""mpiexec -n 8 python scripts/image_train.py --mt_task masked --data_dir imagenet ..."""

from guided_mt.commands.train import console

if __name__ == "__main__":
    console()
