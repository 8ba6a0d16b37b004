"""python scripts/autoencoder_train.py --config latent_mt/configs/autoencoder_kl_camvid.yaml data.params.path=camvid.tar ..."""

import _installed  # noqa: F401 - first

from latent_mt.commands.autoencoder_train import console

if __name__ == "__main__":
    console()
