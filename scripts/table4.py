"""python scripts/table4.py --preset camvid --autoencoder runs/autoencoder_kl_camvid data.params.path=camvid-256.tar"""

import _installed  # noqa: F401 - first

from reproduce.table4 import console

if __name__ == "__main__":
    console()
