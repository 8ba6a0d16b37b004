"""python scripts/latent_restore.py --model_path RUN --data_dir images.zip"""

import _installed  # noqa: F401 - first

from latent_mt.commands.latent_restore import console

if __name__ == "__main__":
    console()
