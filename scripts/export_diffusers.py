"""python scripts/export_diffusers.py --model_path RUN --out FOLDER"""

import _installed  # noqa: F401 - first

from latent_mt.commands.export_diffusers import console

if __name__ == "__main__":
    console()
