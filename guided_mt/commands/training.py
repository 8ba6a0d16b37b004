"""What the two training commands share: checks of the settings, what is announced, and the run itself."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..runs.checkpoint import checkpoints, read_classes, read_config
from ..runs.config import Config, DiffusionConfig
from ..runs.distributed import Processes
from ..runs.loop_config import LoopConfig
from ..training.loop import Loop, batch_sizes


def check_run(config: Config, *, averaged: bool = True) -> None:
    """What can be said of a run's settings before anything is built, where ADM's flag becomes ours. Raises UserError.

    averaged: whether it needs an --ema_rate.
    """
    diffusion = config[DiffusionConfig]
    if diffusion.timestep_respacing:  # here ADM's flag says what to train on; as saved it would be a wish for sampling
        if diffusion.trained_timesteps not in ("", diffusion.timestep_respacing):
            raise UserError(
                f"--timestep_respacing {diffusion.timestep_respacing} contradicts --trained_timesteps "
                f"{diffusion.trained_timesteps}; give one of them"
            )
        diffusion.trained_timesteps, diffusion.timestep_respacing = diffusion.timestep_respacing, ""
    for rate in config.ema_rate.split(",") if averaged or config.ema_rate else []:
        try:
            inside = 0 <= float(rate) < 1
        except ValueError:
            inside = False
        if not inside:
            raise UserError(
                f"--ema_rate '{config.ema_rate}': write rates between 0 and 1, such as '0.9999' or '0.999,0.9999'"
            )
    if not config.data_dir:
        raise UserError("--data_dir is missing: a folder, .tar or .zip of images, an .npz, or builtin:digits")


def keep_clipping(config: Config, folder: Path) -> None:
    """A run that goes on clips its gradient as it began, where no --grad_clip is given: the default was once 1."""
    found = checkpoints(folder)
    if found and "grad_clip" not in config.typed:
        saved = read_config(found[-1] / "model.safetensors") or {}
        config[LoopConfig].grad_clip = saved.get("grad_clip", config.grad_clip)


def run_lines(config: Config, processes: Processes, folder: Path, parameters: float) -> list[str]:
    """What is announced before a run; parameters: how many, in millions."""
    total, local, micro = batch_sizes(config, processes.world_size)
    return [
        f"run folder {folder}",
        f"{processes.world_size} process(es) by {processes.launcher}, first on {processes.device}",
        f"{total} images per step: {local} per process, {micro} per pass",
        f"{parameters:.2f} M parameters",
    ]


def saved_classes(folder: Path) -> list[str] | None:
    """The class names of a run's newest checkpoint; None without one."""
    found = checkpoints(folder)
    return read_classes(found[-1]) if found else None


def train(loop: Loop) -> None:
    """Write the run's config.yaml and train to the end."""
    if loop.processes.is_main:
        try:
            loop.folder.mkdir(parents=True, exist_ok=True)
            (loop.folder / "config.yaml").write_text(loop.resolved_yaml())
        except OSError as error:
            raise UserError(
                f"--log_dir {loop.folder}: can't be written ({error.strerror}); name another folder"
            ) from None
        reached = f"resuming after step {loop.step}" if loop.step else "starting"
        print(f"# {len(loop.source)} images, {reached}", flush=True)
    loop.run_loop()
    loop.network = None  # DistributedDataParallel holds on to the group, whose threads have to end before Python does
    loop.processes.close()
