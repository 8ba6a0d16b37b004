"""python scripts/figure6.py --joint RUN --data_dir TRAIN --val_data_dir HELD_OUT --out DIR --iterations 2000."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluations.classification import score_file, write_csv
from evaluations.curves import common_curve, describe, first_at_least, plot_curves
from evaluations.errors import EvaluationError
from evaluations.figures import new_figure
from guided_mt.commands import figure6
from guided_mt.commands.console import run
from guided_mt.errors import UserError


def main(argv: Sequence[str]) -> None:
    try:
        new_figure(1, 1)  # before hours of training
    except EvaluationError:
        raise UserError("the figure needs matplotlib: pip install -e '.[eval]'") from None
    made = figure6.main(argv, script=Path(__file__).with_name("classifier_train.py"))
    try:
        if made is not None:
            draw(*made)
    except EvaluationError as error:  # such as the NaN of a diverged classifier
        raise UserError(str(error)) from None


def draw(out: Path, files: Mapping[str, Sequence[Sequence[Path]]]) -> None:
    """The table, the figure and what they say; files: per series and seed, one by step."""
    results, curves = [], {}
    for name, runs in files.items():
        scored = [[score_file(str(path.parents[1].relative_to(out)), path) for path in seed] for seed in runs]
        results += [result for seed in scored for result in seed]
        curves[figure6.SERIES[name]] = common_curve([{r.step: r.scores.top1 for r in seed} for seed in scored])
    write_csv(results, out / "figure6.csv")
    plot_curves(curves, out / "figure6.png", "top-1 accuracy, noised held-out images")
    for name, curve in curves.items():
        print(describe(name, curve))
    tuned, scratch = curves.values()
    step = first_at_least(tuned, scratch.mean[-1])
    reached = "does not reach it" if step is None else f"reaches it at step {step}"
    print(f"the last accuracy from scratch is {scratch.mean[-1]:.4f}; fine-tuning {reached}")
    print(f"{out / 'figure6.csv'}, {out / 'figure6.png'}: of noised held-out images")


if __name__ == "__main__":
    run(main)
