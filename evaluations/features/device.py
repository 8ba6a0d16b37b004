"""Where tensors are worked on, and how exactly."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..errors import EvaluationError


def choose_device(name: str | None) -> str:
    """`name`, or for None the GPU if there is one. Raises EvaluationError where there is no such device."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        known = False
    if not known:
        raise EvaluationError(f"--device {name}: not here; there are cpu and {torch.cuda.device_count()} cuda devices")
    return name


def without_tf32() -> AbstractContextManager[None]:
    """Convolutions in float32 on GPUs too. TF32, torch's default there, has 10 bits of mantissa: scores would depend on the GPU
    in their third digit, and the variances of SSIM, small differences of squares, would be lost."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
