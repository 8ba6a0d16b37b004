"""python scripts/image_classify.py --model_path RUN --data_dir ..., or --classifier_path RUN."""

from reproduce.classify import console

if __name__ == "__main__":
    console()
