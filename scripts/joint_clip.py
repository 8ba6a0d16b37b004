"""python scripts/joint_clip.py --data_dir emoji-64.tar"""

import _installed  # noqa: F401 - first

from reproduce.joint_clip import console

if __name__ == "__main__":
    console()
