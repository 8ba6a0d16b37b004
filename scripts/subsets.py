"""python scripts/subsets.py --model_path RUN"""

from reproduce.subsets import console

if __name__ == "__main__":
    console()
