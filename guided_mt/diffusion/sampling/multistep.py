"""Rules of second and third order that remember the estimates of earlier timesteps: one call of the network per step.

With lambda = log(sqrt(abar) / sigma) and h the length of a step in it, every rule here is a DDIM step with an estimate that was
moved along a polynomial through the last ones. None extrapolates over a longer step than the one it has seen: a step that is
longer takes the slope of that one only, since evenly spaced timesteps end in one huge step, over which the published rule is worse
than DDIM. The last step, to z_0, is DDIM's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from .denoiser import Estimate
from .samplers import Sampler


class DPMSolverPP(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): the estimate in the middle of the step, by the last two."""

    def run(self, z: Tensor, steps: Iterable[int]) -> Tensor:
        """Algorithm 2 of DPM-Solver++ (Lu et al. 2022), with fresh noise in each step where the rule `renews_noise`."""
        previous: tuple[int, Estimate] | None = None
        for step in steps:
            estimate = self.denoise(z, step)
            held, z = estimate, z if self.renews_noise else self.second_look(z, step, estimate)
            if previous is not None and step > 0:
                before = float(self.lambdas[step] - self.lambdas[previous[0]])
                h = min(float(self.lambdas[step - 1] - self.lambdas[step]), before)
                held = estimate.toward((-0.5 * h / before, previous[1]))
            noise = self.noise(z) if self.renews_noise else None
            z = self.move(z, step, step - 1, held, noise, float(self.renews_noise))
            previous = (step, estimate)
        return z


class SDEDPMSolverPP(DPMSolverPP):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5): the same estimate in the stochastic equation, whose first-order step is
    DDIM's with eta = 1. New noise at every step forgets what was wrong at the start."""

    renews_noise = True


class UniPC(Sampler):
    """UniPC-p with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 to 8, "bh2"): each new estimate also corrects the step that led
    to it, without a call of its own."""

    order = 2

    def run(self, z: Tensor, steps: Iterable[int]) -> Tensor:
        """Predictor and corrector of UniPC (Zhao et al. 2023) in turn; the corrector takes no call of its own."""
        history: list[tuple[int, Estimate]] = []
        before: Tensor | None = None
        for step in steps:
            estimate = self.denoise(z, step)
            if before is not None:  # UniC: the last step once more, now that its end is known
                z = self.move(before, history[-1][0], step, self._corrected(history, (step, estimate)))
            history = [*history, (step, estimate)][-self.order :]
            before = z
            z = self.move(z, step, step - 1, self._predicted(history) if step > 0 else estimate)
        return z

    def _predicted(self, history: Sequence[tuple[int, Estimate]]) -> Estimate:
        """UniP: the estimate to hold from the last timestep of `history` to the next one."""
        step, estimate = history[-1]
        # The third order needs three estimates, and is not taken into the last step but one, as in the published code.
        earlier = history[-2::-1][: 1 if step == 1 else None]
        h = float(self.lambdas[step - 1] - self.lambdas[step])
        if earlier:
            h = min(h, float(self.lambdas[step] - self.lambdas[earlier[0][0]]))
        return estimate.toward(*self._terms(step, h, earlier))

    def _corrected(self, history: Sequence[tuple[int, Estimate]], new: tuple[int, Estimate]) -> Estimate:
        """UniC: the estimate to hold from the last timestep of `history` to that of `new`."""
        step, estimate = history[-1]
        h = float(self.lambdas[new[0]] - self.lambdas[step])
        earlier = history[-2::-1][: 1 if new[0] == 0 else None]
        return estimate.toward(*self._terms(step, h, [*earlier, new]))

    def _terms(self, step: int, h: float, others: Sequence[tuple[int, Estimate]]) -> list[tuple[float, Estimate]]:
        """(weight, estimate) of the other timesteps in a step of length h from `step`: rho_k / r_k."""
        ratios = [float(self.lambdas[other] - self.lambdas[step]) / h for other, _ in others]
        return [(w / r, estimate) for w, r, (_, estimate) in zip(unipc_weights(ratios, h), ratios, others, strict=True)]


class UniPC3(UniPC):
    """UniPC of third order."""

    order = 3


def unipc_weights(ratios: Sequence[float], h: float) -> list[float]:
    """rho_k of UniPC's differences for the nodes r_k = (lambda_k - lambda) / h, z_0-prediction, B(h) = e^h - 1 (theorem 3.1).

    A single node has weight 1/2, which is enough for second order.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    # phi_{k+1}(-h), and the right-hand sides k! phi_{k+1} / phi_1 of R rho = b with R_{ik} = r_k^(i-1)
    phi, wanted = math.expm1(-h) / -h, []
    first = phi
    for k in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        wanted.append(math.factorial(k) * phi / first)
    powers = np.vander(ratios, increasing=True).T
    return np.linalg.solve(powers, np.array(wanted)).tolist()
