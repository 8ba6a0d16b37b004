"""python scripts/export_adm.py --model_path RUN --out FILE.pt"""

import _installed  # noqa: F401 - first

from guided_mt.commands.export import console

if __name__ == "__main__":
    console()
