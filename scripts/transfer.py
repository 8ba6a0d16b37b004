"""python scripts/transfer.py --data_dir emoji-64.tar/train --val_data_dir emoji-64.tar/test --preset five-emoji32"""

import _installed  # noqa: F401 - first

from reproduce.transfer import console

if __name__ == "__main__":
    console()
