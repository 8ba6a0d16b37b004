"""Draw docs/moving_frame.png, the drawing of the moving frame: python docs/figures/moving_frame.py [FILE]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

DATA, FRAME, NETWORK, GIVEN = "#e8eef7", "#fdebd0", "#dff0e0", "#f3e3f1"
INK, GREY = "#1c1c1c", "#5a5a5a"
IMAGE_ROW, MODALITY_ROW, GIVEN_ROW = 6.5, 4.0, 1.75  # heights of the three rows


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, *lines: str) -> None:
    """A rounded box around the centre (x, y): its first line large, the others small below it."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.18"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=1.2)
    )
    top = y + 0.21 * (len(lines) - 1)
    for i, line in enumerate(lines):
        size, ink = (13.5, INK) if i == 0 else (10.5, GREY)
        axes.text(x, top - 0.44 * i, line, ha="center", va="center", fontsize=size, color=ink)


def arrow(axes: Axes, points: Sequence[tuple[float, float]], colour: str = INK, style: str = "-") -> None:
    """A line through `points` with its head at the last."""
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=colour, linestyle=style, linewidth=1.6, solid_capstyle="round")
    ends = {"arrowstyle": "-|>", "mutation_scale": 15, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(*points[-2:], color=colour, linestyle=style, linewidth=1.6, **ends))


def note(
    axes: Axes, x: float, y: float, text: str, size: float = 10.5, colour: str = GREY, align: str = "center"
) -> None:
    """Words beside an arrow."""
    axes.text(x, y, text, ha=align, va="center", fontsize=size, color=colour)


def draw(axes: Axes) -> None:
    """The image's row, the modality's row with the frame, the door of what is given, and the way back while sampling."""
    box(axes, 1.35, IMAGE_ROW, 2.3, 1.3, DATA, "$z_0$", "the image")
    box(
        axes,
        5.35,
        IMAGE_ROW,
        3.5,
        1.3,
        DATA,
        r"$\sqrt{\bar\alpha_t}\,z_0+\sqrt{1-\bar\alpha_t}\,\varepsilon$",
        "plain DDPM noise",
    )
    arrow(axes, [(2.5, IMAGE_ROW), (3.6, IMAGE_ROW)])
    arrow(axes, [(7.1, IMAGE_ROW), (8.78, IMAGE_ROW)])
    note(axes, 7.9, IMAGE_ROW + 0.33, "$y_t$", 14, INK)
    axes.add_patch(Circle((9.08, IMAGE_ROW), 0.3, facecolor="white", edgecolor=INK, linewidth=1.4, zorder=3))
    note(axes, 9.08, IMAGE_ROW, "+", 16, INK)
    arrow(axes, [(9.38, IMAGE_ROW), (11.2, IMAGE_ROW)])
    note(axes, 10.25, IMAGE_ROW + 0.33, "$z_t=y_t+s_t$", 13, INK)

    box(axes, 1.35, MODALITY_ROW, 2.3, 1.5, DATA, "$x_i$", "label, mask,", "map, vector, ...")
    box(axes, 5.25, MODALITY_ROW, 1.9, 1.3, FRAME, "$E_i(x_i)$", "encoder")
    box(axes, 7.72, MODALITY_ROW, 1.8, 1.3, FRAME, r"$\times\ \tilde\alpha_t^{(i)}$", "coefficient")
    arrow(axes, [(2.5, MODALITY_ROW), (4.3, MODALITY_ROW)])
    note(axes, 3.4, MODALITY_ROW + 0.67, "form U, or")
    note(axes, 3.4, MODALITY_ROW + 0.27, "not given")
    arrow(axes, [(6.2, MODALITY_ROW), (6.82, MODALITY_ROW)])
    arrow(axes, [(8.62, MODALITY_ROW), (9.08, MODALITY_ROW), (9.08, IMAGE_ROW - 0.3)])
    note(axes, 9.25, 5.05, "$s_t$, the frame:", 11.5, INK, "left")
    note(axes, 9.25, 4.6, "the sum over $i$", 10.5, GREY, "left")

    box(axes, 7.0, GIVEN_ROW, 3.9, 1.45, GIVEN, "given", "images as input channels,", "labels, vectors as tokens")
    arrow(axes, [(2.1, MODALITY_ROW - 0.75), (2.1, GIVEN_ROW), (5.05, GIVEN_ROW)])
    note(axes, 3.58, GIVEN_ROW + 0.27, "form X, form any")
    arrow(axes, [(8.95, GIVEN_ROW), (11.2, GIVEN_ROW)])
    note(axes, 10.07, GIVEN_ROW + 0.27, "no frame then")

    box(
        axes, 12.2, (IMAGE_ROW + GIVEN_ROW) / 2, 2.0, IMAGE_ROW - GIVEN_ROW + 1.3, NETWORK, "network", "U-Net, time $t$"
    )
    box(axes, 15.5, IMAGE_ROW, 2.6, 1.3, NETWORK, r"$\hat\varepsilon$", r"noise (or $z_0$, $v$)")
    box(axes, 15.5, MODALITY_ROW, 2.6, 1.3, NETWORK, r"head $D_i:\ \hat x_i$", "what it says of $x_i$")
    arrow(axes, [(13.2, IMAGE_ROW), (14.2, IMAGE_ROW)])
    arrow(axes, [(13.2, MODALITY_ROW), (14.2, MODALITY_ROW)])

    arrow(axes, [(15.5, MODALITY_ROW - 0.65), (15.5, 0.55), (0.9, 0.55), (0.9, MODALITY_ROW - 0.75)], GREY, "--")
    note(axes, 8.2, 0.24, r"while sampling, an $x_i$ that is not given is the estimate $\hat x_i$ of its head")


def main(file: Path) -> None:
    """Write the drawing to `file`, 1720 pixels wide on white, so that it is readable on a dark page too."""
    figure = plt.figure(figsize=(10.75, 4.65), dpi=160, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 17), ylim=(0, 7.4))
    axes.axis("off")
    plt.rcParams["mathtext.fontset"] = "cm"
    draw(axes)
    figure.savefig(file, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "moving_frame.png")
