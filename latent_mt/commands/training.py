"""What the training commands of latent models share: the command line, what is announced and checked, and the run itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from guided_mt.errors import UserError
from guided_mt.modalities.registry import TASKS
from guided_mt.modalities.settings import row_of
from guided_mt.runs import precision, resume
from guided_mt.runs.checkpoint import read_classes, read_config
from guided_mt.runs.config import make_section
from guided_mt.runs.distributed import Processes
from guided_mt.runs.processes.claim import Claim
from guided_mt.runs.resume import newest_checkpoint

from ..data import LatentCache, StreamedData
from ..first_stage.first_stages import Autoencoder
from ..first_stage.latents import first_stage_hash
from ..model.latent_diffusion import TEXT_KEYS, LatentMTDiffusion
from ..runs.configuration import load_config, replaced
from ..runs.launched import device_of, join
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
    words: tuple[str, ...] = ()  # the keys that stand on the command line

    def types(self, key: str) -> bool:
        """Whether the command line sets this key, or one below it."""
        return any(word == key or word.startswith(f"{key}.") for word in self.words)

    @property
    def yaml(self) -> str:
        """The whole configuration as YAML."""
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
    family = "first stage" if issubclass(kind, Autoencoder) else "latent"
    resume.refuse_other_run(Path(settings.log_dir), family, "run.log_dir")
    newest = newest_checkpoint(Path(settings.log_dir))
    if newest is not None and "ema_warmup" not in (config.get("run") or {}):
        settings.ema_warmup = saved_run(newest)["ema_warmup"]
    config["run"] = dict(vars(settings))
    config["model"], config["data"] = with_defaults(config["model"]), with_defaults(config.get("data") or {})
    if not config.get("data"):
        raise UserError(f"{args.config}: has no 'data: {{target, params}}'")
    words = tuple(word.partition("=")[0] for word in args.overrides)
    return Command(config, settings, Path(settings.log_dir), args.dry_run, words)


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
    processes = join(trainer_options(command.config))
    claim = (
        contextlib.nullcontext()
        if command.dry_run
        else processes.sole_writer(Claim(command.folder, setting="run.log_dir"))
    )
    with claim:
        _train(command, processes, check, wrap)
    processes.close()


def _train(
    command: Command, processes: Processes, check: Callable[[Any, Any], None], wrap: Callable[[Any], TrainedModule]
) -> None:
    """What `train` does once the folder is its own."""
    config, settings = command.config, command.run
    newest = newest_checkpoint(command.folder)
    said = settle_precision(command, newest)
    data = instantiate(config["data"], "data")
    folder = RunFolder(command.folder, settings, "")
    trainer = make_trainer(folder, trainer_options(config), processes)
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
    if hasattr(model, "network"):  # LDM's unet_config.params.use_bf16
        model.network.precision, more = precision.choose(
            model.network.precision, device_of(trainer_options(config)), typed=command.types("model.params.unet_config")
        )
        said += more
        said += null_class_notes(model)
    folder.config_yaml = command.yaml
    if newest is not None:
        check_resumed(newest, config)
        if isinstance(data, StreamedData) and reads_labels(model):
            data.use_classes(read_classes(newest))
    module = wrap(model)
    module.base_rate = learning_rate_of(config["model"], images)
    if trainer.is_global_zero:
        print(command.yaml, end="")
        for line in (*replaced(config), *said):
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


def settle_precision(command: Command, newest: Path | None) -> list[str]:
    """Choose `lightning.trainer.precision` for this machine; returns lines to print. newest: the checkpoint to go on from."""
    options = (command.config.get("lightning") or {}).get("trainer") or {}
    own = ""
    if newest is not None:
        saved = ((read_config(newest / "model.safetensors") or {}).get("lightning") or {}).get("trainer") or {}
        own = _precision(saved)
    key = "lightning.trainer.precision"
    wanted, device = _precision(options), device_of(trainer_options(command.config))
    chosen, lines = precision.choose(wanted, device, typed=command.types(key), own=own, fp32="32-true")
    if chosen != wanted:
        command.config["lightning"] = {
            **(command.config.get("lightning") or {}),
            "trainer": {**options, "precision": chosen},
        }
    return lines


def _precision(options: Mapping[str, Any]) -> str:
    """Lightning's present name of `precision`."""
    word = str(options.get("precision") or "32-true")
    return {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(word, word)


def null_class_notes(model: LatentMTDiffusion) -> list[str]:
    """What to say of a network with a null class: that it sees nothing else, or that it never sees it."""
    network = model.network
    if not network.has_null_class:
        return []
    if not model.classes_told:
        return [
            f"the network knows {network.num_classes} classes and is told none (cond_stage_key is not class_label): every image is "
            "seen as its null class"
        ]
    if model.config.mt_drop_prob == 0:
        return [
            "mt_drop_prob 0: the null class is never trained, from which classifier-free guidance leads away; DiT takes 0.1"
        ]
    return []


def reads_labels(model: Any) -> bool:
    """Whether training uses the images' classes, whose ids then stay what they were when the run began."""
    names = getattr(model, "modality_names", ())
    by_condition = getattr(model, "cond_stage_key", None) == "class_label" or getattr(model, "classes_told", 0) > 0
    return by_condition or any(row_of(model.config, name).needs_labels for name in names)


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
    _add_options(saved["model"].get("params") or {})
    there, here = fixed_settings({**saved, "model": with_defaults(saved["model"])}), fixed_settings(config)
    keys = [*here, *(key for key in there if key not in here)]
    resume.refuse_other_settings(
        newest, {k: there.get(k) for k in keys}, {k: here.get(k) for k in keys}, "take another run.log_dir"
    )


def _add_options(params: dict[str, Any]) -> None:
    """Give the modalities of a saved configuration the options that their rows have got since, at the values that change
    nothing."""
    for name, entry in (params.get("mt_tasks") or {}).items():
        row = (entry or {}).get("task", name)
        if row in TASKS:
            params["mt_tasks"][name] = {f.name: f.default for f in fields(TASKS[row].options)} | (entry or {})


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
    if model.cond_stage_key == "class_label" or model.classes_told:
        _check_each_has_class(data)
    _check_count_of_classes(model, data)
    if model.cond_stage_key in TEXT_KEYS and model.conditioning_key is not None:
        _check_has_captions(model, data)
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
            f"latents of {found} pixels don't divide into unet_config's levels or patches: take a multiple of {divisor}"
        )


def _check_each_has_class(data: Any) -> None:
    """Raises UserError where an item of training or validation has no class, or nobody has one."""
    for source in (data.source, data.val_source):
        lacking = 0 if source is None else len(source) if source.labels is None else int((source.labels < 0).sum())
        if lacking:
            raise UserError(
                f"{source.path}: {lacking} of {len(source)} items have no class, which model.params.cond_stage_key class_label "
                f"needs; leave them out"
            )


def _check_count_of_classes(model: LatentMTDiffusion, data: Any) -> None:
    """Raises UserError where the data have more classes than the network is told of."""
    count = len(data.source.class_names)
    if 0 < model.classes_told < count:
        raise UserError(
            f"model.params.unet_config.params.num_classes {model.classes_told}: the data have {count} classes; raise it"
        )


def _check_has_captions(model: LatentMTDiffusion, data: Any) -> None:
    """Raises UserError where the data of a model with a text condition have no captions."""
    for source in (data.source, data.val_source):
        if source is not None and source.captions is None:
            raise UserError(
                f"{source.path}: has no captions, which model.params.cond_stage_key {model.cond_stage_key} needs; say where they "
                "are in data.params.captions"
            )
