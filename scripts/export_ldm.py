"""python scripts/export_ldm.py --model_path RUN --out model.ckpt"""

import _installed  # noqa: F401 - first

from latent_mt.commands.export_ldm import console

if __name__ == "__main__":
    console()
