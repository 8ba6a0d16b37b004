"""The parents' numbers that are small enough to keep: tests/golden/adm_runs.npz and ldm_runs.npz."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np


def write_adm(folder: Path) -> None:
    from guided_diffusion.script_util import create_model

    from . import adm, training
    from .inputs import STEPS, images, network, normals
    from .standins import given_normals

    _, _, rates = training.trained_by_adm(create_model(**training.NETWORK), training.STEPS)
    with given_normals(*normals(STEPS)):
        bound = adm.process(str(STEPS)).calc_bpd_loop(network, images())
    found = {
        "ancestral": adm.drawn_by_adm(),
        "ddim25": adm.drawn_by_adm("ddim", respacing="ddim25"),
        "guided_ancestral": adm.drawn_by_adm(scale=2.0),
        "guided_ddim_1": adm.drawn_by_adm("ddim", 1.0),
        "guided_ddim_200": adm.drawn_by_adm("ddim", 200.0),
        "annealed": np.array(rates),
        "images": images(),
        **{f"bpd_{name}": values for name, values in bound.items()},
    }
    np.savez_compressed(folder / "adm_runs.npz", **{name: np.asarray(values) for name, values in found.items()})


def write_ldm(folder: Path) -> None:
    from . import ldm

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = {f"ddim_eta{eta:g}": np.asarray(ldm.drawn_by_ldm(eta)) for eta in (0.0, 1.0)}
    np.savez_compressed(folder / "ldm_runs.npz", **found)
