"""FD-DINOv2 (Stein et al. 2023): Frechet distance on the features of DINOv2 ViT-L/14, with that paper's resize."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import EvaluationError
from ..files.hashing import sha256
from ..files.images import ImageSet
from .device import without_tf32
from .moments import Moments, Statistics

MODEL, WEIGHTS, SIZE = "dinov2-vit-l-14", "dinov2_vitl14_pretrain.pth", 224


class DinoV2:
    """torch-fidelity's extractor, fed with images of 224 x 224, which its own resize leaves as they are.

    Code and weights are Meta's, by torch.hub: cached files or a download. Raises EvaluationError where neither works.
    """

    def __init__(self, device: torch.device | str) -> None:
        try:
            from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
        except ImportError as error:
            raise EvaluationError(f"fd_dinov2 needs torch-fidelity ({error}): pip install '.[eval]'") from error
        self.device, self.software = torch.device(device), f"{MODEL} (torch-fidelity {version('torch-fidelity')})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.module = FeatureExtractorDinoV2(MODEL, ["dinov2"]).to(self.device)
            weights = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
            self.sha256 = sha256(weights) if weights.is_file() else "unknown"
        except (OSError, RuntimeError, ValueError) as error:
            hub = Path(torch.hub.get_dir())
            raise EvaluationError(
                f"fd_dinov2: torch.hub cannot get DINOv2 ({str(error).splitlines()[0]}); put its repository into "
                f"{hub / 'facebookresearch_dinov2_main'} and {WEIGHTS} into {hub / 'checkpoints'}"
            ) from error

    @torch.inference_mode()
    def statistics(self, images: ImageSet, batch_size: int, workers: int, what: str) -> Statistics:
        """Mean and covariance of the class token, of all images."""
        moments = Moments()
        with ThreadPoolExecutor(max(1, workers)) as pool, tqdm(total=images.count, unit="img", desc=what) as bar:
            for batch in images.batches(batch_size, workers):
                x = torch.from_numpy(np.stack(list(pool.map(resize, batch)))).permute(0, 3, 1, 2)
                with without_tf32():
                    (features,) = self.module(x.to(self.device))
                if not features.isfinite().all():
                    raise EvaluationError(f"{images.path}: DINOv2's features are not finite; are its weights damaged?")
                moments.update(features.cpu().numpy())
                bar.update(len(batch))
        return moments.statistics()


def resize(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [224, 224, 3] by Pillow's bicubic filter, which is antialiased."""
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
