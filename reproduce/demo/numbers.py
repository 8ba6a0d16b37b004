"""What the demo measures on held-out digits: restoration against two baselines, and whether digits are what their label says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from guided_mt.data import load_images, open_source

TRAINING, HELD_OUT = "builtin:digits", "builtin:digits-test"


def restoration(file: Path) -> str:
    """A table of mean squared errors in the masked region, pixels in [-1, 1], and the mean absolute error of the rest.

    file: of `mt-diffusion restore`, the first images of the held-out digits.
    """
    with np.load(file, allow_pickle=False) as arrays:
        original, masked, ours = (
            arrays[name].astype(np.float64) / 127.5 - 1 for name in ("original", "masked", "restored")
        )
        hidden = np.broadcast_to(arrays["mask"][..., None] > 127, original.shape)
    images, _ = digits(TRAINING, original.shape[1])
    filled = np.where(hidden, images.mean(axis=0) / 127.5 - 1, masked)
    rows = {"MT-Diffusion": ours, "mean training image": filled, "left masked (grey)": masked}
    outside = np.abs(ours - original)[~hidden].mean()
    return "\n".join(
        [
            f"Mean squared error in the masked region ({hidden.mean():.0%} of the pixels, which lie in [-1, 1]):",
            *(f"  {name:22s} {((x - original) ** 2)[hidden].mean():.3f}" for name, x in rows.items()),
            f"Mean absolute error of the rest, which the model keeps by itself: {outside:.3f}",
        ]
    )


def labels(named: Path, drawn: Path, restored: Path) -> str:
    """How often the label head is right, and how often drawn and restored digits are what they should be, as a support vector
    machine reads them that was trained on the same real digits.

    Files of `mt-diffusion classify` on the held-out digits, of `sample` with labels given, and of `restore` on the first of the
    held-out digits.
    """
    from sklearn.svm import SVC  # here: a second to import

    with np.load(named, allow_pickle=False) as arrays:
        head = (arrays["probabilities"].argmax(axis=1) == arrays["labels"]).mean()
        count = len(arrays["labels"])
    with np.load(drawn, allow_pickle=False) as arrays:
        samples, given = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays.files else arrays["labels"]
    with np.load(restored, allow_pickle=False) as arrays:
        filled, masked = arrays["restored"], arrays["masked"]
    reader = SVC(gamma=0.001).fit(*_read(*digits(TRAINING, samples.shape[1])))
    held_out, truth = digits(HELD_OUT, samples.shape[1])
    right = lambda images, wanted: float((reader.predict(_read(images, wanted)[0]) == wanted).mean())  # noqa: E731
    return "\n".join(
        [
            f"The label head names {head:.1%} of {count} held-out digits correctly.",
            f"A support vector machine on the real digits, which names {right(held_out, truth):.1%} of them, reads",
            f"  {right(samples, given):4.0%} of {len(samples)} digits drawn with a label given as that label,",
            f"  {right(filled, truth[: len(filled)]):4.0%} of the restored digits as what they were "
            f"({right(masked, truth[: len(masked)]):.0%} of the masked ones).",
        ]
    )


def digits(source: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [N, size, size, 3], classes [N])."""
    loaded = load_images(open_source(source), size)
    return loaded.images.permute(0, 2, 3, 1).numpy(), loaded.labels.numpy()


def _read(images: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [N, D] on the scale of scikit-learn's digits, 0 to 16, each the mean of 2 x 2; classes [N])."""
    grey = images.astype(np.float64).mean(axis=-1)
    count, height, width = grey.shape
    small = grey.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
    return small.reshape(count, -1) * (16 / 255), classes
