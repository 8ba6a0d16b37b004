"""python scripts/encode_latents.py --config FILE.yaml --out FOLDER [--splits train,val] [key=value ...]"""

import _installed  # noqa: F401 - first

from latent_mt.commands.encode_latents import console

if __name__ == "__main__":
    console()
