"""What the training commands of latent models share: the command line, what is announced and checked, and the run itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from guided_mt.errors import UserError
from guided_mt.modalities.registry import TASKS
from guided_mt.modalities.settings import row_of
from guided_mt.runs import resume
from guided_mt.runs.checkpoint import read_config
from guided_mt.runs.config import make_section
from guided_mt.runs.resume import newest_checkpoint

from ..data import LatentCache
from ..first_stage.latents import first_stage_hash
from ..model.latent_diffusion import LatentMTDiffusion
from ..runs.configuration import load_config, replaced
from ..runs.run import RunFolder, fit, flatten, make_trainer
from ..runs.run_config import RunConfig
from ..runs.targets import instantiate, parameters, resolve
from ..runs.trained_module import TrainedModule
from ..runs.trainer_options import trainer_options
from .arguments import Arguments

DEFAULT_RATE = 1e-4


@dataclass
class Command:
    """A training command as read: the configuration with everything resolved, and what follows from it."""

    config: dict[str, Any]
    run: RunConfig
    folder: Path
    dry_run: bool

    @property
    def yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.config))


def read_command(args: Arguments, kind: type) -> Command:
    """What the arguments mean; model.target must be a `kind`. Raises UserError."""
    config = load_config(args.config, args.overrides)
    target = resolve(config["model"]["target"])
    if not issubclass(target, kind):
        raise UserError(f"{args.config}: model.target {config['model']['target']} is not what this script trains")
    settings = make_section(RunConfig, config.get("run") or {}, f"{args.config}: run")
    settings.log_dir = settings.log_dir or f"runs/{Path(args.config).stem}"
    if settings.ema_rate and not _is_rate(settings.ema_rate):
        raise UserError(
            f"{args.config}: run.ema_rate '{settings.ema_rate}': write one rate between 0 and 1, or leave it empty"
        )
    newest = newest_checkpoint(Path(settings.log_dir))
    if newest is not None and "ema_warmup" not in (config.get("run") or {}):
        settings.ema_warmup = saved_run(newest)["ema_warmup"]
    config["run"] = dict(vars(settings))
    config["model"], config["data"] = with_defaults(config["model"]), with_defaults(config.get("data") or {})
    if not config.get("data"):
        raise UserError(f"{args.config}: has no 'data: {{target, params}}'")
    return Command(config, settings, Path(settings.log_dir), args.dry_run)


def saved_run(newest: Path) -> dict[str, Any]:
    """The `run` section of a checkpoint's configuration. Runs before `ema_warmup` had averages without it."""
    return {"ema_warmup": False, **((read_config(newest / "model.safetensors") or {}).get("run") or {})}


def with_defaults(config: Any) -> Any:
    """A configuration with the defaults of every `params` written out, so that it says the same whatever they become."""
    if not isinstance(config, dict):
        return config
    filled = {key: with_defaults(value) for key, value in config.items()}
    if isinstance(config.get("target"), str):
        known = parameters(resolve(config["target"]))
        defaults = {key: p.default for key, p in known.items() if p.default is not p.empty}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
        filled["params"] = plain | (filled.get("params") or {})
    return filled


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def train(command: Command, check: Callable[[Any, Any], None], wrap: Callable[[Any], TrainedModule]) -> None:
    """Build model and data, announce them, and fit. check(model, data) raises UserError where they don't fit together.

    wrap: what trains the model that the configuration describes.
    """
    config, settings = command.config, command.run
    data = instantiate(config["data"], "data")
    folder = RunFolder(command.folder, settings, "")
    trainer = make_trainer(folder, trainer_options(config))
    images = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    if settings.images_per_step not in (-1, images):
        raise UserError(
            f"run.images_per_step {settings.images_per_step}, but data.params.batch_size {data.batch_size} x {trainer.world_size} "
            f"processes x {trainer.accumulate_grad_batches} accumulated batches are {images}: change one of them"
        )
    config["run"]["images_per_step"] = settings.images_per_step = images
    torch.manual_seed(settings.seed)  # the same initial weights on every process
    model = instantiate({key: config["model"][key] for key in ("target", "params") if key in config["model"]}, "model")
    resolve_tasks(config, model)
    folder.config_yaml = command.yaml
    newest = newest_checkpoint(command.folder)
    if newest is not None:
        check_resumed(newest, config)
    module = wrap(model)
    module.base_rate = learning_rate_of(config["model"], images)
    if trainer.is_global_zero:
        print(command.yaml, end="")
        for line in replaced(config):
            print(f"# {line}")
        print(f"# run folder {command.folder}")
        print(f"# {images} images per step, learning rate {module.base_rate:g}")
        print(
            f"# {sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6:.2f} M parameters to train",
            flush=True,
        )
    if command.dry_run:
        return
    data.open()
    check(model, data)
    fit(trainer, folder, module, data)


def learning_rate_of(model: dict[str, Any], images: int) -> float:
    """`model.learning_rate`, or LDM's `base_learning_rate` times the images of a step."""
    if "base_learning_rate" in model:
        return float(model["base_learning_rate"]) * images
    return float(model.get("learning_rate", DEFAULT_RATE))


def resolve_tasks(config: dict[str, Any], model: Any) -> None:
    """Write what the model found out of its modalities into `mt_tasks`, so that the file says it without theirs."""
    params = config["model"].get("params") or {}
    for name, entry in (params.get("mt_tasks") or {}).items():
        own = model.config.own[name]
        found = {f.name: own[f.name] for f in fields(row_of(model.config, name).options)}
        params["mt_tasks"][name] = {**(entry or {}), **found}


def fixed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} that must not change within a run."""
    free = ["ckpt_path", "monitor", "log_every_t"]  # weights are in the checkpoint, wherever they came from
    free += [option for task in TASKS.values() for option in task.file_options]
    flat = flatten(config["model"].get("params") or {}, "model.params.")
    fixed = {key: value for key, value in flat.items() if key.rpartition(".")[2] not in free}
    return fixed | {f"run.{key}": config["run"].get(key) for key in ("seed", "images_per_step", "ema_warmup")}


def check_resumed(newest: Path, config: dict[str, Any]) -> None:
    """UserError where the run in `newest` was trained with other settings than those of a resolved configuration. What
    later versions added has its default in older runs."""
    saved = {"model": {}, **(read_config(newest / "model.safetensors") or {}), "run": saved_run(newest)}
    there, here = fixed_settings({**saved, "model": with_defaults(saved["model"])}), fixed_settings(config)
    keys = [*here, *(key for key in there if key not in here)]
    resume.refuse_other_settings(
        newest, {k: there.get(k) for k in keys}, {k: here.get(k) for k in keys}, "take another run.log_dir"
    )


def check_first_stage(model: LatentMTDiffusion, data: Any) -> None:
    """Raises UserError where the data's sides or the size of their latents are not what the model is configured for."""
    sides, named = list(data.source.side_names), list(model.sides)
    if len(named) > max(1, len(sides)):
        raise UserError(
            f"model.params.mt_sides {named} needs data of as many images each, such as pairs (data.target latent_mt.data.PairData)"
        )
    if len(sides) > 1 and not named:
        raise UserError(f"the data are images of {' and '.join(sides)} each: name them in model.params.mt_sides")
    if len(sides) > 1 and not model.takes(sides):
        raise UserError(f"model.params.mt_sides {named}, but the data's sides are {sides}")
    needing = [name for name in model.modality_names if row_of(model.config, name).needs_labels]
    if needing and data.source.labels is None:
        raise UserError(f"model.params.mt_tasks.{needing[0]} needs classes, and {data.source.path} has none")
    if needing and len(data.source.class_names) > model.modalities[needing[0]].num_classes:  # type: ignore[attr-defined]
        count, known = len(data.source.class_names), model.modalities[needing[0]].num_classes  # type: ignore[attr-defined]
        raise UserError(
            f"model.params.mt_tasks.{needing[0]}.num_classes {known}: the data have {count} classes; raise it"
        )
    if isinstance(data.source, LatentCache):
        data.source.check(first_stage_hash(model.first_stage_model))
        found = data.source.shape[-1]
    else:
        model.first_stage_model.check_size(data.image_size, data.image_size)
        found = data.image_size // model.first_stage_model.downsampling
    if found != model.size:
        raise UserError(
            f"images of {data.image_size} pixels give latents of {found}, but model.params.image_size is {model.size}"
        )
    divisor = model.network.size_divisor
    if found % divisor:
        raise UserError(
            f"latents of {found} pixels can't be halved as often as unet_config.channel_mult asks: take a multiple of {divisor}"
        )
