"""What a `target` of a YAML file means, and building it.

A `target` is a dotted name as in latent-diffusion. Names come from a registry and nothing else is imported: a YAML file can't
run code that the program doesn't know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from guided_mt.errors import UserError, nearest
from guided_mt.runs.config import check_keys

from .. import HOMES

MARKS = ("__is_first_stage__", "__is_unconditional__")  # LDM's values of cond_stage_config that are no configurations

_REGISTRY = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": "latent_mt.model.latent_diffusion:LatentMTDiffusion",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": "latent_mt.model.unet:UNetModel",
    "models.DiT": "latent_mt.model.dit:DiT",  # facebookresearch/DiT's
    "models.SiT": "latent_mt.model.dit:SiT",  # willisma/SiT's
    "models.sit.SiT": "latent_mt.model.dit:SiT",  # sihyun-yu/REPA's
    "guided_mt.DiT": "latent_mt.model.dit:DiT",
    "guided_mt.networks.dit.DiT": "latent_mt.model.dit:DiT",
    "ldm.models.autoencoder.AutoencoderKL": "latent_mt.first_stage.first_stages:AutoencoderKL",
    "ldm.models.autoencoder.VQModel": "latent_mt.first_stage.first_stages:VQModel",
    "ldm.models.autoencoder.VQModelInterface": "latent_mt.first_stage.first_stages:VQModelInterface",
    "ldm.models.autoencoder.IdentityFirstStage": "latent_mt.first_stage.first_stages:IdentityFirstStage",
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
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": "latent_mt.conditioners:FrozenOpenCLIPEmbedder",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": "latent_mt.conditioners:FrozenCLIPEmbedder",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": "latent_mt.runs.lr_scheduler:LambdaWarmUpCosineScheduler",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2": "latent_mt.runs.lr_scheduler:LambdaWarmUpCosineScheduler2",
    "ldm.lr_scheduler.LambdaLinearScheduler": "latent_mt.runs.lr_scheduler:LambdaLinearScheduler",
    "latent_mt.data.PairData": "latent_mt.data:PairData",
    "latent_mt.data.ImageData": "latent_mt.data:ImageData",
    "latent_mt.data.ShardData": "latent_mt.data:ShardData",
}

# Modules by which the configurations of older runs name their classes.
_FORMER = {
    "latent_mt.autoencoder": "latent_mt.first_stage.first_stages",
    "latent_mt.first_stage.autoencoder": "latent_mt.first_stage.first_stages",
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
_CLIP = "is not built: of CLIP's stages this package has the texts' FrozenOpenCLIPEmbedder and FrozenCLIPEmbedder alone"


def _no_class(takes: str) -> str:
    """What to say of a model that is conditioned on more than text: its input has weights for what it takes."""
    return (
        f"is not built: its network also takes {takes}, and of latent-diffusion's and Stable Diffusion's models this package has "
        "LatentDiffusion alone; take a checkpoint that draws from text alone, as v2-inference.yaml and v2-inference-v.yaml describe"
    )


_FOREIGN = {
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": _no_class("a mask and the latent of the masked image"),
    "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion": _no_class("a depth map, made by MiDaS"),
    "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion": _no_class(
        "an image of low resolution, with noise of a level that it is told"
    ),
    "ldm.models.diffusion.ddpm.LatentUpscaleFinetuneDiffusion": _no_class(
        "an image of low resolution, with noise of a level that it is told"
    ),
    "ldm.models.diffusion.ddpm.LatentFinetuneDiffusion": _no_class("channels beside the latent"),
    "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion": _no_class(
        "the CLIP embedding of an image, with noise of a level that it is told"
    ),
    "sgm.models.diffusion.DiffusionEngine": _no_class("two text encoders' vectors and the size of the image"),
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
    check_target(target)
    instead = way_out(target)
    if instead:
        raise UserError(f"{target} {instead}")
    module, _, attribute = (_home(target) or target).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{target}: {module}:{attribute} can't be imported ({error})") from None


def _home(target: str) -> str | None:
    """ "module:attribute" of a registered name. What LDM's names mean can also be written as latent_mt.NAME, or module.NAME."""
    if target in _REGISTRY:
        return _REGISTRY[target]
    module, _, attribute = target.rpartition(".")
    if module == "latent_mt" and attribute in HOMES:
        module = f"latent_mt.{HOMES[attribute]}"
    own = f"{_FORMER.get(module, module)}:{attribute}"
    return own if own in _REGISTRY.values() else None


def way_out(target: str) -> str:
    """What to do instead of building one of LDM's classes that we don't have; '' for all others."""
    return "" if _home(target) else next((way for name, way in _FOREIGN.items() if target.startswith(name)), "")


def check_target(target: str) -> None:
    """Raises UserError for a name that means nothing here, naming the nearest one. Nothing is imported."""
    if not _home(target) and not way_out(target):
        known = {*_REGISTRY, *(home.replace(":", ".") for home in _REGISTRY.values())}
        raise UserError(
            f"unknown target '{target}'{nearest(target, known)}; classes of your own are named by latent_mt.register"
        )


# ---------------------------------------------------------------- building


def instantiate(config: Any, where: str, **extra: Any) -> Any:
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
        why = "belongs in cond_stage_config only" if config in MARKS else "is no configuration"
        raise UserError(f"{where}: '{config}' {why}; write {{target: NAME, params: {{...}}}}")
    check_keys(config, ("target", "params"), where)
    if not isinstance(config.get("target"), str):
        raise UserError(f"{where}: has no target, the dotted name of a class")
    params = mapping(config, "params", where)
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


def mapping(parent: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    """What stands under `key`, {} where there is nothing. Raises UserError where that is no mapping."""
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{source}: '{key}' must hold 'key: value' lines, not '{value}'")
    return value or {}
