"""Timestep weights: factors on a squared error, by timestep and by what is predicted.

`--timestep_weights` weighs the image's term by them, `--mt_timestep_weights` those of the modalities, each by itself. They have
nothing to do with the aggregation weights w_t.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .targets import TARGETS

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023
P2_K, P2_GAMMA = 1.0, 1.0  # Choi et al. 2022


def _p2(snr: np.ndarray) -> np.ndarray:
    """P2 (Choi et al. 2022, eq. 8): 1 / (k + SNR_t)^gamma."""
    return 1.0 / (P2_K + snr) ** P2_GAMMA


def _min_snr(snr: np.ndarray) -> np.ndarray:
    """Min-SNR-5 (Hang et al. 2023): min(SNR_t, 5) / SNR_t."""
    return np.minimum(snr, MIN_SNR_GAMMA) / snr


LEARNED = "learned"

# Each row: the factor on the squared error of eps, as a function of SNR_t. None: 1, whatever is predicted.
TIMESTEP_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "uniform": None,
    "p2": _p2,
    "min-snr": _min_snr,
    LEARNED: None,  # training divides the term by a function of t that it learns (EDM2): see modalities.weighting.over_time
}


def timestep_weights(name: str, alphas_cumprod: np.ndarray, prediction: str = "eps") -> np.ndarray:
    """Factors on the squared error of `prediction`, a name of `targets.TARGETS`, at every timestep, float64 [T].

    alphas_cumprod: abar_t [T]. SNR_t = abar_t / (1 - abar_t); where it is 0 (zero terminal SNR) the factor is 1, as in Min-SNR's
    own code. Raises ValueError for an unknown name, and a prediction that has no weights.
    """
    if name not in TIMESTEP_WEIGHTS:
        raise ValueError(f"unknown timestep weights '{name}'; choose from {', '.join(TIMESTEP_WEIGHTS)}")
    weighted = {name: row.eps_error for name, row in TARGETS.items() if row.eps_error is not None}
    if prediction not in weighted:
        raise ValueError(f"unknown prediction '{prediction}'; choose from {', '.join(weighted)}")
    abar = np.asarray(alphas_cumprod, dtype=np.float64)
    rule = TIMESTEP_WEIGHTS[name]
    if rule is None:
        return np.ones_like(abar)
    seen = abar > 0
    snr = np.where(seen, abar / (1 - abar), 1.0)
    return np.where(seen, rule(snr) * weighted[prediction](snr), 1.0)
