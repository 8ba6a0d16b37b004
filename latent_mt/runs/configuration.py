"""LDM's YAML files: reading them, naming what is wrong in them, and building the objects that they describe.

    model:     {target, base_learning_rate or learning_rate, params}
    data:      {target, params}
    lightning: {trainer, callbacks, logger, modelcheckpoint}
    run:       ours, see latent_mt.runs.run_config.RunConfig

A `target` is a dotted name as in latent-diffusion. Names come from a registry and nothing else is imported: a YAML file can't
run code that the program doesn't know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from guided_mt.errors import UserError, nearest, reason
from guided_mt.runs.config import check_keys

from .. import _HOMES

TOP_LEVEL = ("model", "data", "lightning", "run")
LIGHTNING = ("trainer", "callbacks", "logger", "modelcheckpoint")
MARKS = ("__is_first_stage__", "__is_unconditional__")  # LDM's values of cond_stage_config that are no configurations

_REGISTRY = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": "latent_mt.model.latent_diffusion:LatentMTDiffusion",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": "latent_mt.model.unet:UNetModel",
    "ldm.models.autoencoder.AutoencoderKL": "latent_mt.first_stage.autoencoder:AutoencoderKL",
    "ldm.models.autoencoder.VQModel": "latent_mt.first_stage.autoencoder:VQModel",
    "ldm.models.autoencoder.VQModelInterface": "latent_mt.first_stage.autoencoder:VQModelInterface",
    "ldm.models.autoencoder.IdentityFirstStage": "latent_mt.first_stage.autoencoder:IdentityFirstStage",
    "ldm.modules.losses.LPIPSWithDiscriminator": "latent_mt.first_stage.losses:LPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": "latent_mt.first_stage.losses:LPIPSWithDiscriminator",
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "latent_mt.first_stage.losses:VQLPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "latent_mt.first_stage.losses:VQLPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual.DummyLoss": "torch.nn:Identity",
    "taming.modules.losses.vqperceptual.DummyLoss": "torch.nn:Identity",
    "torch.nn.Identity": "torch.nn:Identity",
    "ldm.modules.encoders.modules.ClassEmbedder": "latent_mt.conditioners:ClassEmbedder",
    "ldm.modules.encoders.modules.TransformerEmbedder": "latent_mt.conditioners:TransformerEmbedder",
    "ldm.modules.encoders.modules.BERTTokenizer": "latent_mt.conditioners:BERTTokenizer",
    "ldm.modules.encoders.modules.BERTEmbedder": "latent_mt.conditioners:BERTEmbedder",
    "ldm.modules.encoders.modules.SpatialRescaler": "latent_mt.conditioners:SpatialRescaler",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": "latent_mt.runs.lr_scheduler:LambdaWarmUpCosineScheduler",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2": "latent_mt.runs.lr_scheduler:LambdaWarmUpCosineScheduler2",
    "ldm.lr_scheduler.LambdaLinearScheduler": "latent_mt.runs.lr_scheduler:LambdaLinearScheduler",
    "latent_mt.data.PairData": "latent_mt.data:PairData",
    "latent_mt.data.ImageData": "latent_mt.data:ImageData",
}

# Where version 0.1 had its classes: the configurations of its runs name them so.
_FORMER = {
    "latent_mt.autoencoder": "latent_mt.first_stage.autoencoder",
    "latent_mt.latent_diffusion": "latent_mt.model.latent_diffusion",
    "latent_mt.losses": "latent_mt.first_stage.losses",
    "latent_mt.lr_scheduler": "latent_mt.runs.lr_scheduler",
    "latent_mt.unet": "latent_mt.model.unet",
}

# What LDM's files name and we don't build: the beginning of the name -> the way out.
_OUR_DATA = (
    "is not built here: write data: {target: latent_mt.data.ImageData, params: {path, image_size, batch_size}} for a folder "
    "or archive of images, or latent_mt.data.PairData for pairs"
)
_CLIP = (
    "is not built: frozen CLIP encoders are not part of this package. Give their vectors or tokens directly: encode the "
    "data once with the original, and take cond_stage_config torch.nn.Identity"
)
_FOREIGN = {
    "ldm.data.": _OUR_DATA,
    "taming.data.": _OUR_DATA,
    "main.DataModuleFromConfig": _OUR_DATA,
    "cutlit.DataModuleFromConfig": _OUR_DATA,
    "ldm.modules.encoders.modules.FrozenCLIP": _CLIP,
    "ldm.modules.encoders.modules.FrozenClip": _CLIP,
    "ldm.modules.encoders.modules.FrozenOpenCLIP": _CLIP,
    "main.ImageLogger": "is not built: grids are drawn every run.sample_interval steps",
    "main.SetupCallback": "is not built: the run folder saves the configuration itself",
    "main.CUDACallback": "is not built: progress.csv holds the speed",
    "pytorch_lightning.callbacks.ModelCheckpoint": "is not built: run.save_interval and run.keep_checkpoints decide",
    "pytorch_lightning.callbacks.LearningRateMonitor": "is not built: progress.csv holds the learning rate",
    "pytorch_lightning.loggers.": "is not built: every run writes progress.csv and TensorBoard events",
}


# ---------------------------------------------------------------- reading


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file with `a.b.c=value` overrides applied in their order, as plain dictionaries and lists of known shape.

    An override of a `target` by another class empties its `params`. Raises UserError for a file that can't be read, an override
    that can't be applied, and as `check_shape` does.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({reason(error)})") from None
    try:
        config = OmegaConf.create(text)
    except Exception as error:  # OmegaConf and PyYAML raise many kinds; all mean the same to the user
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or reason(error)})") from None
    if not OmegaConf.is_dict(config) or not config:
        raise UserError(f"{path}: a YAML file with the keys {', '.join(TOP_LEVEL)} is expected")
    for word in overrides:
        key, sign, value = word.partition("=")
        if not sign or not key or key.startswith("-"):
            raise UserError(f"don't know what to do with '{word}'; overrides are written key.of.the.file=value")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
            if key.endswith(".target") and OmegaConf.select(config, key) not in (None, value):
                # Another class takes other keys: its params come after it on the command line.
                OmegaConf.select(config, key.removesuffix(".target"))["params"] = {}
            OmegaConf.update(config, key, given["value"], merge=True)
        except Exception as error:
            raise UserError(f"{word}: can't be applied to {path} ({reason(error)})") from None
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or "a key"
        raise UserError(f"{path}: {key} has no value; give it as {key}=VALUE on the command line") from None
    except Exception as error:
        raise UserError(f"{path}: {reason(error)}") from None
    check_shape(plain, str(path))
    return plain


def check_shape(config: Mapping[str, Any], source: str = "the configuration") -> None:
    """Raises UserError for top-level keys, parts and targets that no latent model has, naming the nearest valid one.

    Nothing is imported or built; keys of `params` are checked by `instantiate`.
    """
    check_keys(config, TOP_LEVEL, source)
    if "model" not in config:
        raise UserError(f"{source}: has no 'model: {{target, params}}'")
    for part, keys in (
        ("model", ("target", "params", "base_learning_rate", "learning_rate")),
        ("data", ("target", "params")),
        ("lightning", LIGHTNING),
        ("run", None),
    ):
        value = _mapping(config, part, source)
        if keys:
            check_keys(value, keys, f"{source}: {part}")
    model = config["model"]
    rates = [key for key in ("base_learning_rate", "learning_rate") if key in model]
    if len(rates) > 1:
        raise UserError(f"{source}: model has both {' and '.join(rates)}; give one of them")
    for key in rates:
        if isinstance(model[key], bool) or not isinstance(model[key], (int, float)) or not 0 <= model[key] < 1e9:
            raise UserError(f"{source}: model.{key} takes a number, not '{model[key]}'")
    for key in LIGHTNING:
        _mapping(config.get("lightning") or {}, key, f"{source}: lightning")
    for part in ("model", "data"):
        if config.get(part) and not isinstance(config[part].get("target"), str):
            raise UserError(f"{source}: {part} has no target, the dotted name of a class")
    for part in TOP_LEVEL[:3]:
        for where, target in _targets(config.get(part), part):
            try:
                _check_target(target)
            except UserError as error:
                raise UserError(f"{source}: {where}: {error}") from None


def replaced(config: Mapping[str, Any]) -> list[str]:
    """One line for each of LDM's callbacks and loggers in a configuration that something of ours stands for."""
    lines = []
    for where, target in _targets(config.get("lightning"), "lightning"):
        way_out = _way_out(target)
        if way_out and "lightning.trainer." not in where:
            lines.append(f"{where}: {target} {way_out}")
    return lines


def _mapping(parent: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{source}: '{key}' must hold 'key: value' lines, not '{value}'")
    return value or {}


def _targets(config: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, dotted name) of every {target, params} in a configuration, outer ones first."""
    if isinstance(config, dict):
        if isinstance(config.get("target"), str):
            yield where, config["target"]
        for key, value in config.items():
            yield from _targets(value, f"{where}.{key}")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _targets(value, f"{where}.{index}")


# ---------------------------------------------------------------- names


def register(name: str, home: str) -> None:
    """Make the target `name` mean `home`, written "module:attribute", which is imported when it is first built.

    Raises ValueError for another spelling, and for a name that means something else already.
    """
    module, colon, attribute = home.partition(":")
    if not module or not colon or not attribute.isidentifier():
        raise ValueError(f"'{home}' must be written module:attribute")
    if _home(name) not in (None, home):
        raise ValueError(f"'{name}' is already {_home(name)}")
    _REGISTRY[name] = home


def resolve(target: str) -> type:
    """The class that a dotted name of LDM or of ours means. Raises UserError for any other, and says what to write instead."""
    _check_target(target)
    way_out = _way_out(target)
    if way_out:
        raise UserError(f"{target} {way_out}")
    module, _, attribute = _home(target).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{target}: {module}:{attribute} can't be imported ({error})") from None


def _home(target: str) -> str | None:
    """ "module:attribute" of a registered name. What LDM's names mean can also be written as latent_mt.NAME, or module.NAME."""
    if target in _REGISTRY:
        return _REGISTRY[target]
    module, _, attribute = target.rpartition(".")
    if module == "latent_mt" and attribute in _HOMES:
        module = f"latent_mt.{_HOMES[attribute]}"
    own = f"{_FORMER.get(module, module)}:{attribute}"
    return own if own in _REGISTRY.values() else None


def _way_out(target: str) -> str:
    """What to do instead of building one of LDM's classes that we don't have; '' for all others."""
    return "" if _home(target) else next((way for name, way in _FOREIGN.items() if target.startswith(name)), "")


def _check_target(target: str) -> None:
    if not _home(target) and not _way_out(target):
        known = {*_REGISTRY, *(home.replace(":", ".") for home in _REGISTRY.values())}
        raise UserError(
            f"unknown target '{target}'{nearest(target, known)}; classes of your own are named by "
            "latent_mt.runs.configuration.register"
        )


# ---------------------------------------------------------------- building


def instantiate(config: Mapping[str, Any], where: str, **extra: Any) -> Any:
    """The object that {target, params} describes. extra: arguments that the program gives.

    where: the place in the file, for messages ("model.params.unet_config"). Nested configurations are handed on as they are.
    Raises UserError as `arguments` does.
    """
    cls, keywords = arguments(config, where, extra)
    return cls(**keywords, **extra)


def arguments(config: Any, where: str, extra: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
    """(class, keyword arguments) that {target, params} describes. extra: keys that the program gives.

    Raises UserError for an unknown target, unknown, missing or mistyped keys of params, and for LDM's marks.
    """
    if not isinstance(config, Mapping):
        known = "belongs in cond_stage_config only" if config in MARKS else "is no configuration"
        raise UserError(f"{where}: '{config}' {known}; write {{target: NAME, params: {{...}}}}")
    check_keys(config, ("target", "params"), where)
    if not isinstance(config.get("target"), str):
        raise UserError(f"{where}: has no target, the dotted name of a class")
    params = _mapping(config, "params", where)
    try:
        cls = resolve(config["target"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    known = parameters(cls)
    check_keys(params, known, f"{where}.params")
    for key in params:
        if key in extra:
            raise UserError(f"{where}.params.{key}: is set by the program; leave it out")
    required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
    absent = [key for key in required if key not in params and key not in extra]
    if absent:
        raise UserError(f"{where}.params: lacks {', '.join(absent)} of {config['target']}")
    return cls, {key: _typed(value, known[key], f"{where}.params.{key}") for key, value in params.items()}


def parameters(cls: Callable) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a class; where its constructor hands **kwargs on, those of its bases too.

    A class whose constructor names none of its arguments can say so by `__signature__`, as in Python's inspect.
    """
    chain = [base for base in cls.__mro__ if _takes_keys(base)] if inspect.isclass(cls) else [cls]
    found: dict[str, inspect.Parameter] = {}
    for base in chain:
        own = base.__init__ if inspect.isclass(base) and "__signature__" not in vars(base) else base
        signature = inspect.signature(own).parameters.values()
        named = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        found = {**{p.name: p for p in named}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            break
    return found


def _takes_keys(base: type) -> bool:
    """Whether a class has a constructor whose arguments can be keys of a file: torch's and Lightning's can't."""
    foreign = base is object or base.__module__.split(".")[0] in ("torch", "pytorch_lightning", "lightning")
    return not foreign and ("__init__" in vars(base) or "__signature__" in vars(base))


def _typed(value: Any, parameter: inspect.Parameter, where: str) -> Any:
    """`value` checked against a plain type hint (int, float, bool, str, Sequence, each perhaps `| None`); 5e4 is an int too."""
    hint = parameter.annotation
    names = [part.strip() for part in (hint if isinstance(hint, str) else getattr(hint, "__name__", "")).split("|")]
    kinds = [name.partition("[")[0] for name in names if name != "None"]
    if len(kinds) != 1 or kinds[0] not in _TYPES or (value is None and ("None" in names or parameter.default is None)):
        return value
    wanted, types = _TYPES[kinds[0]]
    if kinds[0] == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, types) or (isinstance(value, bool) and kinds[0] != "bool"):
        raise UserError(f"{where} takes {wanted}, not '{value}'")
    return value


_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "str": ("text", (str,)),
    "Sequence": ("a list", (list, tuple)),
}


# ---------------------------------------------------------------- Lightning's Trainer

# Arguments that the run folder sets, by what to write instead.
_OF_THE_RUN = {
    "max_steps": "run.total_steps",
    "max_epochs": "run.total_steps",
    "min_steps": "run.total_steps",
    "min_epochs": "run.total_steps",
    "enable_progress_bar": "run.log_interval",
    "enable_model_summary": "nothing: the model's size is printed",
    "num_sanity_val_steps": "nothing",
    "fast_dev_run": "run.total_steps",
    "overfit_batches": "data.params.limit",
    "limit_train_batches": "run.total_steps",
    "limit_val_batches": "run.val_interval",
    "gradient_clip_val": "run.grad_clip",
    "gradient_clip_algorithm": "run.grad_clip",
    "max_time": "run.total_steps; the same command again goes on",
    "log_every_n_steps": "run.log_interval",
    "row_log_interval": "run.log_interval",
    "val_check_interval": "run.val_interval",
    "check_val_every_n_epoch": "run.val_interval",
    "default_root_dir": "run.log_dir",
    "weights_save_path": "run.log_dir",
    "enable_checkpointing": "run.save_interval",
    "checkpoint_callback": "run.save_interval",
    "resume_from_checkpoint": "nothing: the same command again resumes",
    "callbacks": "lightning.callbacks",
    "logger": "nothing: every run writes progress.csv and TensorBoard events",
    "reload_dataloaders_every_n_epochs": "nothing: the data is one stream",
    "use_distributed_sampler": "nothing: the data is split by the sample's position",
    "replace_sampler_ddp": "nothing: the data is split by the sample's position",
}
# Arguments of Lightning 1.x under their present names; the values keep their meaning.
_RENAMED = {"terminate_on_nan": "detect_anomaly"}
# Arguments of Lightning 1.x without a successor.
_GONE = {
    "tpu_cores": "write accelerator: tpu, devices: N",
    "ipus": "no device of that kind is supported any more",
    "amp_backend": "precision: 16-mixed does it",
    "amp_level": "precision: 16-mixed does it",
    "auto_lr_find": "set model.base_learning_rate",
    "auto_scale_batch_size": "set data.params.batch_size",
    "auto_select_gpus": "devices: N takes the free ones",
    "progress_bar_refresh_rate": "run.log_interval decides how often a line is printed",
    "weights_summary": "leave it out",
    "flush_logs_every_n_steps": "leave it out: every row is flushed",
    "track_grad_norm": "leave it out: progress.csv holds the norm of the gradient",
    "stochastic_weight_avg": "run.ema_rate keeps averaged weights",
    "log_gpu_memory": "leave it out",
    "process_position": "leave it out",
    "prepare_data_per_node": "leave it out",
    "reload_dataloaders_every_epoch": "leave it out: the data is one stream",
    "truncated_bptt_steps": "leave it out",
    "automatic_optimization": "leave it out",
    "move_metrics_to_cpu": "leave it out",
    "multiple_trainloader_mode": "leave it out",
}
_STRATEGIES = ("ddp", "ddp_spawn", "ddp_sharded", "ddp2", "dp", "horovod")  # Lightning 1.x: values of `accelerator`


def trainer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """`lightning.trainer` as keyword arguments of today's pl.Trainer; `gpus`, `accelerator: ddp` and their like are translated.

    Raises UserError for arguments that the run folder sets, that Lightning no longer has, or that it never had.
    """
    from pytorch_lightning import Trainer

    where = "lightning.trainer"
    given = dict(_mapping(config.get("lightning") or {}, "trainer", "lightning"))
    known = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", *_OF_THE_RUN)]
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in _OF_THE_RUN:
            raise UserError(f"{where}.{key}: is set by the run; write {_OF_THE_RUN[key]} instead")
        if key == "accumulate_grad_batches" and value is None:
            continue
        if key == "accumulate_grad_batches" and (type(value) is not int or value < 1):
            raise UserError(f"{where}.{key} {value}: write a whole number of 1 or more")
        if key in _GONE:
            raise UserError(f"{where}.{key}: Lightning no longer has it; {_GONE[key]}")
        for name, translated in _translated(key, value, where).items():
            if name not in known:
                raise UserError(f"{where}: unknown key '{key}'{nearest(key, [*known, 'gpus'])}")
            if options.get(name, translated) != translated:
                raise UserError(f"{where}.{key}: contradicts {name}: {options[name]}; give one of them")
            options[name] = translated
    return options


def _translated(key: str, value: Any, where: str) -> dict[str, Any]:
    """One of Lightning 1.x's arguments in today's terms; others as they are."""
    if key == "gpus":
        if value in (None, 0, "0"):
            return {"accelerator": "cpu"}
        return {"accelerator": "gpu", "devices": _devices(value, f"{where}.gpus")}
    if key == "num_processes":
        return {"devices": value}
    if key == "distributed_backend" or (key == "accelerator" and value in _STRATEGIES):
        if value not in _STRATEGIES[:2]:
            raise UserError(f"{where}.{key}: Lightning no longer has '{value}'; write strategy: ddp")
        return {"strategy": value}
    return {_RENAMED.get(key, key): value}


def _devices(value: Any, where: str) -> int | list[int]:
    """Lightning 1.x's gpus: 2 and "2" are a number of devices, -1 all, "0," and "0,3" and [0, 3] their indices."""
    try:
        if isinstance(value, str) and "," in value:
            return [int(word) for word in value.split(",") if word.strip()]
        if isinstance(value, list):
            return [int(word) for word in value]
        if isinstance(value, (bool, float)):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: '{value}' is no number of devices and no list of their indices") from None
