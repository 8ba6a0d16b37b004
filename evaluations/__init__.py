"""Scores of generated images: ADM's five numbers and the paper's tables. Stands alone: imports nothing of the other packages.

python evaluations/evaluator.py ref.npz samples.npz        Inception Score, FID, sFID, precision, recall (KID, FD-DINOv2)
python evaluations/make_reference.py SRC OUT.npz           a reference batch of any images
python evaluations/restoration.py RESTORED.npz             Table 1
python evaluations/segmentation.py PRED REF                Table 4
python evaluations/classification.py PROBABILITIES.npz     Figure 6
"""
