"""Draw docs/rooms.png, the map of the packages and their folders: python docs/figures/rooms.py [FILE]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK, GREY, ROOM = "#1c1c1c", "#5a5a5a", "#ffffff"
# Each package: its colour, and its folders from the top down with what they hold. Folders of one row know nothing of each other.
GUIDED = [
    {"commands": "one file per command"},
    {"training": "Algorithm 2, the loops"},
    {"generation": "draw, restore, classify"},
    {"modalities": "the second kinds of data"},
    {"runs": "flags, checkpoints, processes"},
    {"networks": "U-Net, classifier, heads"},
    {"diffusion": "the frame, samplers", "data": "images as a stream"},
]
LATENT = [
    {"commands": "one file per command"},
    {"training": "Lightning modules"},
    {"model": "diffusion on latents"},
    {"first_stage": "autoencoders", "conditioners": "texts, images"},
    {"runs": "YAML files, .ckpt", "data": "pairs, latents"},
    {"configs": "named configurations"},
]
SCORES = [
    {"tables": "tables, figures"},
    {"scores": "the formulas"},
    {"features": "Inception, DINOv2"},
    {"files": "images, maps, palettes"},
]
ROW = 0.74  # height of a row of folders


def package(axes: Axes, x: float, top: float, width: float, colour: str, name: str, rows: list[dict[str, str]]) -> None:
    """A package as a box with its folders stacked in it; `x`, `top` is its upper left corner."""
    height = ROW * len(rows) + 0.62
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, top - height), width, height, boxstyle=style, facecolor=colour, edgecolor=INK))
    axes.text(x + width / 2, top - 0.29, name, ha="center", va="center", fontsize=12.5, color=INK, weight="bold")
    for k, row in enumerate(rows):
        each = (width - 0.3 - 0.12 * (len(row) - 1)) / len(row)
        for j, (folder, what) in enumerate(row.items()):
            left, bottom = x + 0.15 + j * (each + 0.12), top - 0.55 - ROW * (k + 1) + 0.06
            axes.add_patch(
                FancyBboxPatch((left, bottom), each, ROW - 0.12, boxstyle=style, facecolor=ROOM, edgecolor=GREY)
            )
            axes.text(left + each / 2, bottom + 0.42, folder, ha="center", va="center", fontsize=11, color=INK)
            axes.text(left + each / 2, bottom + 0.17, what, ha="center", va="center", fontsize=9.3, color=GREY)


def draw(axes: Axes) -> None:
    """The packages: what stands higher may import what stands lower."""
    for x, width, colour, name, what in (
        (0.1, 8.3, "#f3e3f1", "mt_diffusion", "the one console command"),
        (8.6, 8.3, "#fdebd0", "reproduce", "the paper's tables and figures, from training to the last score"),
    ):
        axes.add_patch(
            FancyBboxPatch(
                (x, 7.75), width, 0.85, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=INK
            )
        )
        axes.text(x + width / 2, 8.33, name, ha="center", va="center", fontsize=12.5, color=INK, weight="bold")
        axes.text(x + width / 2, 8.0, what, ha="center", va="center", fontsize=10, color=GREY)
    package(axes, 0.1, 7.55, 5.6, "#dff0e0", "latent_mt", LATENT)
    package(axes, 5.9, 7.55, 5.6, "#e8eef7", "guided_mt", GUIDED)
    package(axes, 11.7, 7.55, 5.2, "#eeeeee", "evaluations", SCORES)
    for x, y, text in (
        (11.8, 3.50, "A folder may import those below it in its"),
        (11.8, 3.12, "own package. latent_mt also imports"),
        (11.8, 2.74, "guided_mt, and of evaluations the files."),
        (11.8, 2.36, "guided_mt and evaluations import none of"),
        (11.8, 1.98, "the others. mt_diffusion and reproduce"),
        (11.8, 1.60, "import all three."),
    ):
        axes.text(x, y, text, ha="left", va="center", fontsize=9.6, color=INK)


def main(file: Path) -> None:
    """Write the map to `file`, 1720 pixels wide on white, so that it is readable on a dark page too."""
    figure = plt.figure(figsize=(10.75, 4.75), dpi=160, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 17), ylim=(1.2, 8.7))
    axes.axis("off")
    draw(axes)
    figure.savefig(file, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "rooms.png")
