"""python scripts/latent_classify.py --model_path RUN --data_dir ..."""

from reproduce.latent_classify import console

if __name__ == "__main__":
    console()
