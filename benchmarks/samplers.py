"""The process's own error with few steps: a Gaussian with its best network, an unknown modality, every sampler and spacing.

    python benchmarks/samplers.py [--samples 20000]

Frechet distance of generated to true z_0 (12 dimensions); with N draws the floor is about 1e-3 at N = 20000.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from gaussian import JointGaussian, frechet

from guided_mt.diffusion.respacing import create_gaussian_diffusion, frame_timesteps, respace, space_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.modalities import ImageModality

SHAPE = (3, 2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--schedule", default="cosine")
    args = parser.parse_args()
    data = JointGaussian.make(int(np.prod(SHAPE)), seed=1)
    print(f"{args.schedule}, {args.samples} samples, trace of the covariance of z_0 {np.trace(data.cov_z):.2f}")
    print(
        f"{'weights':10s}{'sampler':10s}" + "".join(f"{s:>16s}" for s in ("20 even", "20 frame", "50 even", "50 frame"))
    )
    for weights in ("none", "paper", "bridge", "constant"):
        full = create_gaussian_diffusion(noise_schedule=args.schedule, sigma_small=True, mt_weights={"x": weights})
        for sampler in SAMPLERS:
            cells = []
            for count in (20, 50):
                for kept in (space_timesteps(1000, str(count)), frame_timesteps(full.aggregation, 1000, count)):
                    drawn = sample(
                        data.network_u(full),
                        respace(full, kept),
                        {"x": ImageModality("x")},
                        (args.samples, *SHAPE),
                        sampler=sampler,
                        seeds=range(args.samples),
                        clip_denoised=False,
                    )
                    z = drawn.x_start.flatten(1).double().numpy()
                    cells.append(frechet(z.T @ z / len(z), data.cov_z))
            print(f"{weights:10s}{sampler:10s}" + "".join(f"{cell:16.4f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
