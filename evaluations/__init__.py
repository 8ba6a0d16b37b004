"""Scores of generated images: ADM's five numbers and the paper's tables. Stands alone: imports nothing of the other packages.

mt-diffusion evaluate ref.npz samples.npz               Inception Score, FID, sFID, precision, recall (KID, FD-DINOv2)
mt-diffusion reference SRC OUT.npz                      a reference batch of any images
mt-diffusion score restoration RESTORED.npz             Table 1
mt-diffusion score segmentation PRED REF                Table 4
mt-diffusion score classification PROBABILITIES.npz     Figure 6

Without an installed package each is also a file: python evaluations/evaluator.py, make_reference.py, and the others by their names.
"""
