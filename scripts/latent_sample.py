"""python scripts/latent_sample.py --model_path RUN --given photo"""

import _installed  # noqa: F401 - first

from latent_mt.commands.latent_sample import console

if __name__ == "__main__":
    console()
