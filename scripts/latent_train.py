"""python scripts/latent_train.py --config latent_mt/configs/camvid_mt.yaml data.params.path=camvid-256.tar"""

import _installed  # noqa: F401 - first

from latent_mt.commands.latent_train import console

if __name__ == "__main__":
    console()
