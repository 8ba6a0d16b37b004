"""One dataclass per concern: the source of flags, help, YAML presets, the saved configuration and its validation.

Flags keep ADM's spelling (`--learn_sigma True`). Values come from, later ones winning: the dataclass, the checkpoint (when
sampling), `--preset NAME`, `--config FILE`, the command line. Unknown keys are errors that name the nearest valid one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from typing_extensions import override

from ..data import MAX_PIXELS, MAX_WORKERS
from ..diffusion.sampling import CONDITIONINGS, SAMPLERS
from ..diffusion.schedules import SCHEDULES
from ..diffusion.targets import TARGETS
from ..diffusion.weighting import TIMESTEP_WEIGHTS
from ..errors import UserError, nearest
from ..networks.classifier import POOLS
from . import presets
from .compiling import COMPILE


def option(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    *,
    names: Collection[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    free: bool = False,
    also: Collection[str] = (),
) -> Any:
    """A dataclass field that is a flag of its own name, on the command line under those of `also` too.

    least, most: its range; where the default is -1, that is valid too.
    choices: the valid values; of a registry its names, also those of rows that are added later. names: a registry whose names the
    value is made of; --help lists them.

    free: a trained model may be used with another value, since no weight's meaning depends on it.
    """
    metadata = {"help": help, "choices": choices, "names": names or choices, "least": least, "most": most, "free": free}
    return dataclasses.field(default=default, metadata={**metadata, "also": tuple(also)})


def redefined(section: type, name: str, default: Any = None, help: str = "") -> Any:
    """The option `name` of a section, for another section with its own default or help (those that are given); its range stays."""
    field = {field.name: field for field in dataclasses.fields(section)}[name]
    metadata = {**field.metadata, **({"help": help} if help else {})}
    return dataclasses.field(default=field.default if default is None else default, metadata=metadata)


@dataclass
class ModelConfig:
    """Model (ADM's flags)"""

    image_size: int = option(64, "side of the square images, in pixels", least=1)
    num_channels: int = option(128, "width of the first level", least=1)
    num_res_blocks: int = option(2, "residual blocks per level", least=1)
    num_heads: int = option(4, "attention heads, where num_head_channels is -1", least=1)
    num_heads_upsample: int = option(-1, "attention heads while upsampling; -1: as num_heads", least=1)
    num_head_channels: int = option(-1, "channels per attention head; -1: use num_heads", least=1)
    attention_resolutions: str = option("16,8", "feature map sizes with attention")
    channel_mult: str = option("", "width of each level as multiples of num_channels; empty: by image_size")
    dropout: float = option(0.0, "dropout rate in the residual blocks", least=0, most=1, free=True)
    class_cond: bool = option(False, "give the network the class of each image")
    num_classes: int = option(
        1000, "number of classes, for class_cond True; with --mt_task label that of the data unless given", least=1
    )
    use_checkpoint: bool = option(False, "recompute activations in the backward pass to save memory", free=True)
    use_scale_shift_norm: bool = option(True, "FiLM-like conditioning in the residual blocks")
    resblock_updown: bool = option(False, "residual blocks for up- and downsampling")
    use_fp16: bool = option(False, "ADM's name for --precision fp16", free=True)
    use_new_attention_order: bool = option(False, "split q, k, v before the heads")
    precision: str = option(
        "fp32", "network arithmetic; norms, output and losses stay float32", ("fp32", "bf16", "fp16"), free=True
    )
    compile: str = option(
        "False",
        "torch.compile, as one graph the whole training step, or in sampling, where it has to be asked for again, the network and "
        "the arithmetic around it; "
        "reduce-overhead: on a GPU also as CUDA graphs, for networks so small that starting their kernels takes the time",
        COMPILE,
        free=True,
    )


@dataclass
class DiffusionConfig:
    """Diffusion (ADM's flags)"""

    learn_sigma: bool = option(False, "learn the reverse variances (hybrid loss)")
    sigma_small: bool = option(False, "without learn_sigma: the posterior variance instead of beta", free=True)
    diffusion_steps: int = option(1000, "T", least=2)
    noise_schedule: str = option("linear", "beta schedule", SCHEDULES)
    timestep_respacing: str = option(
        "",
        "timesteps to keep: ADM's '250', 'ddim25', '10,15,20' (ancestral steps, unless a sampler is named), or 'solver20' as "
        "few-step samplers want them; in training those to train on",
        free=True,
    )
    trained_timesteps: str = option(
        "", "timesteps that the network was trained on, as timestep_respacing, which says it in training; empty: all"
    )
    use_kl: bool = option(False, "train on the variational bound")
    prediction: str = option("eps", "what the network predicts", TARGETS)
    predict_xstart: bool = option(False, "ADM's name for --prediction x0")
    predict_v: bool = option(False, "--prediction v: v = sqrt(abar) eps - sqrt(1 - abar) z_0")
    timestep_weights: str = option("uniform", "factors on the image's squared error by timestep", TIMESTEP_WEIGHTS)
    rescale_timesteps: bool = option(False, "tell the network timesteps on the scale 0..1000")
    rescale_learned_sigmas: bool = option(False, "scale the bound of the hybrid loss by T/1000")


@dataclass
class ClassifierConfig:
    """Classifier (ADM's flags)"""

    classifier_width: int = option(
        128, "width of the classifier's first level; attention wants multiples of 64", least=1
    )
    classifier_depth: int = option(2, "the classifier's residual blocks per level", least=1)
    classifier_attention_resolutions: str = option("32,16,8", "feature map sizes with attention in the classifier")
    classifier_use_scale_shift_norm: bool = option(True, "FiLM-like conditioning in the classifier")
    classifier_resblock_updown: bool = option(True, "residual blocks for the classifier's downsampling")
    classifier_pool: str = option("attention", "how the classifier pools its features", POOLS)
    classifier_use_fp16: bool = option(False, "fp16 arithmetic in the classifier")


@dataclass
class DataConfig:
    """Data"""

    data_dir: str = option("", "folder, .tar or .zip of images, .npz, or builtin:digits")
    random_crop: bool = option(False, "random instead of centre crops")
    random_flip: bool = option(True, "mirror half of the images")
    data_workers: int = option(2, "decoding processes per training process", least=0, most=MAX_WORKERS)
    max_pixels: int = option(MAX_PIXELS, "width times height of the largest photo that is read", least=1)


@dataclass
class SamplingOptions:
    """How each sample is drawn"""

    sampler: str = option(
        "dpm++", "rule of each step; where only ADM's timestep_respacing is given, ddpm as there", SAMPLERS
    )
    steps: int = option(
        50, "network calls, whatever the model was trained with; timestep_respacing overrides it", least=1
    )
    eta: float = option(0.0, "noise of the ddim sampler: 0 is deterministic", least=0, most=1)
    use_ddim: bool = option(
        False, "--sampler ddim as ADM's: where a classifier guides, z_0 is clipped before its gradient is added"
    )
    clip_denoised: bool = option(True, "clip the predicted z_0 to [-1, 1]")
    dynamic_threshold: float = option(
        0.0,
        "instead, clip it to this percentile of each sample's values and scale back, as 0.995; 0: off",
        least=0,
        most=1,
    )
    mt_condition: str = option(
        "own-head", "how form U uses a known modality", [c for c in CONDITIONINGS if c != "network"]
    )
    mt_condition_scale: float = option(1.0, "strength of own-head conditioning; 1 is Bayes' rule", least=0)
    guidance_scale: float = option(
        1.0, "classifier-free guidance: eps = eps_u + scale (eps - eps_u), eps_u without conditions; 1 is off", least=0
    )

    @property
    def rule(self) -> str:
        """The sampler to use, by our flag or by ADM's."""
        return "ddim" if self.use_ddim else self.sampler


@dataclass
class SampleConfig(SamplingOptions):
    """Sampling"""

    model_path: str = option("", "run folder, checkpoint folder or weights file (.safetensors, ADM's .pt)")
    out: str = option("", "the .npz to write; a .png grid is put beside it. Empty: inside the run folder")
    batch_size: int = option(16, "samples per forward pass", least=1)
    fill_batches: bool = option(
        True,
        "on a CPU, fill smaller batches up to 16: a sample is then the same to the bit in any batch, and one costs what 16 cost; "
        "False: it is the same to rounding",
    )
    seeds: str = option("", "one seed per sample, as '0-99' or '3,5,10-20'; empty: 0, 1, 2, ...")
    ema: str = option("", "which averaged weights to use, '0.9999' or 'none'; empty: the slowest")
    device: str = option("", "cpu, cuda, cuda:1 ...; empty: a GPU if there is one")
    dry_run: bool = option(False, "print the resolved configuration, then stop")


class Config:
    """Resolved values by section and by name: `config.lr`, `config[TrainConfig]`. `typed` are the keys that the user set, `words`
    those of them that stand on the command line and not in a preset or file; own {modality: {key: value}} are values of one
    modality alone, which a YAML file can give and flags can't."""

    def __init__(
        self,
        sections: Sequence[Any],
        typed: frozenset[str] = frozenset(),
        own: Mapping[str, dict[str, Any]] | None = None,
        words: frozenset[str] = frozenset(),
    ):
        self._sections = {type(section): section for section in sections}
        self.typed, self.words = typed, words
        self.own = dict(own or {})

    def __getitem__(self, section: type) -> Any:
        """The section of this class, else one of a class derived from it."""
        derived = (found for found in self.sections() if isinstance(found, section))
        return self._sections[section] if section in self._sections else next(derived)

    def __getattr__(self, name: str) -> Any:
        for section in self.__dict__.get("_sections", {}).values():
            if name in section.__dataclass_fields__:
                return getattr(section, name)
        raise AttributeError(name)

    def sections(self) -> list[Any]:
        """The sections, each an instance of its dataclass of options."""
        return list(self._sections.values())

    def as_dict(self, *sections: type) -> dict[str, Any]:
        """{key: value} of the named sections, or of all."""
        chosen = sections or tuple(self._sections)
        return {key: value for s in chosen for key, value in dataclasses.asdict(self._sections[s]).items()}

    def to_yaml(self) -> str:
        """All options as YAML, which --config reads."""
        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))


def parse(
    argv: Sequence[str],
    sections: Sequence[type],
    *,
    description: str,
    base: Mapping[str, Any] | None = None,
    presets: bool = False,
) -> Config:
    """Command line -> Config. `base`: values of a checkpoint, over the dataclasses' defaults; its other keys are ignored.

    Raises UserError for an unknown flag or preset key (naming the nearest), a value of the wrong type, and a bad choice.
    `--help` prints every flag with its default and exits.
    """
    fields = {f.name: f for section in sections for f in dataclasses.fields(section)}
    parser = OptionParser(description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.fields = fields
    seen: set[str] = set()
    for section in sections:
        group = parser.add_argument_group((section.__doc__ or "").strip())
        for field in dataclasses.fields(section):
            if field.name not in seen:  # a flag that two sections share is one flag
                seen.add(field.name)
                names = field.metadata["names"]
                text = field.metadata["help"] + (f" ({', '.join(names)})" if names else "")
                group.add_argument(
                    *(f"--{name}" for name in (field.name, *field.metadata["also"])),
                    default=field.default,
                    metavar=_word(field),
                    help=text.replace("%", "%%"),
                )
    if presets:
        parser.add_argument("--preset", default="", metavar="NAME", help=f"named settings: {', '.join(preset_names())}")
        parser.add_argument(
            "--config", default="", metavar="FILE", help="YAML of flags, e.g. another run's config.yaml"
        )

    # Only what was typed: defaults are suppressed so that the checkpoint's and the preset's values can come in between.
    words, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(seen)))
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            raise UserError(
                f"unknown flag --{name}{nearest(name, [*seen, *(['preset', 'config'] if presets else [])])}; --help lists all"
            )
        raise UserError(f"don't know what to do with '{word}'; flags are written --name value")
    values = {key: value for key, value in (base or {}).items() if key in fields}
    typed: dict[str, Any] = {}
    if presets:
        for source, content in ((words.preset, load_preset), (words.config, _load_yaml)):
            if source:
                typed.update(check_keys(content(source), fields, source))
    on_command_line = {name: getattr(words, name) for name in seen if getattr(words, name) is not None}
    typed.update(on_command_line)
    values.update(typed)
    resolved = {name: _convert(fields[name], value) for name, value in values.items()}
    if resolved.get("use_fp16"):  # another name for a precision: from here on there is only one
        if "precision" in on_command_line and resolved["precision"] != "fp16":
            raise UserError(f"--use_fp16 True contradicts --precision {resolved['precision']}; give one of them")
        resolved |= {"precision": "fp16", "use_fp16": False}
    made = [
        section(**{f.name: resolved[f.name] for f in dataclasses.fields(section) if f.name in resolved})
        for section in sections
    ]
    return Config(made, frozenset(typed), words=frozenset(on_command_line))


class OptionParser(argparse.ArgumentParser):
    """A parser of options. fields: {flag: its field}, which says its choices and range."""

    fields: Mapping[str, dataclasses.Field]

    @override
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description's lines as they are written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in ("", None) else action.help


def _word(field: dataclasses.Field) -> str:
    return {"bool": "BOOL", "int": "N", "float": "X", "str": "TEXT"}[_type_name(field)]


def _type_name(field: dataclasses.Field) -> str:
    return field.type if isinstance(field.type, str) else field.type.__name__


def _convert(field: dataclasses.Field, value: Any) -> Any:
    kind = _type_name(field)
    result: Any
    try:
        if kind == "bool":
            result = value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]
        elif kind == "int":
            if (isinstance(value, (bool, float)) and int(value) != value) or isinstance(value, bool):
                raise ValueError
            result = int(value)
        elif kind == "float":
            result = float(value)
            if not math.isfinite(result):
                raise ValueError
        else:
            result = "" if value is None else str(value)
            if "True" in (field.metadata["choices"] or ()):  # a switch with more than two positions
                result = str(_BOOLEANS.get(result.strip().lower(), result))
    except (ValueError, KeyError, TypeError, OverflowError):
        wanted = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "text"}[kind]
        raise UserError(f"--{field.name} takes {wanted}, not '{value}'") from None
    choices = field.metadata["choices"]
    if choices and result not in choices:
        raise UserError(f"--{field.name}: '{result}' is none of {', '.join(choices)}{nearest(result, choices)}")
    _check_range(field, result)
    return result


def _check_range(field: dataclasses.Field, value: Any) -> None:
    least, most = field.metadata["least"], field.metadata["most"]
    chosen_by_us = value == field.default == -1
    if chosen_by_us or ((least is None or value >= least) and (most is None or value <= most)):
        return
    wanted = f"between {least} and {most}" if most is not None else f"at least {least}"
    also = ", or -1" if field.default == -1 else ""
    raise UserError(f"--{field.name} must be {wanted}{also}, not {value}")


_BOOLEANS = {
    word: word in ("yes", "true", "t", "y", "1")
    for word in ["yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"]
}


def check_keys(values: Mapping[str, Any], known: Collection[str], source: str | Path) -> dict[str, Any]:
    """`values` as they are. Raises UserError for a key that isn't in `known`, naming the nearest that is."""
    for key in values:
        if key not in known:
            raise UserError(f"{source}: unknown key '{key}'{nearest(str(key), known)}")
    return dict(values)


def make_section(section: type, values: Mapping[str, Any], source: str | Path) -> Any:
    """A dataclass of options with these values. Raises UserError for unknown keys and bad values."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    known = check_keys(values, fields, source)
    try:
        return section(**{name: _convert(fields[name], value) for name, value in known.items()})
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix('--')}") from None


def preset_names() -> list[str]:
    """Names of the presets that --preset takes, in order."""
    return presets.names()


def load_preset(name: str) -> dict[str, Any]:
    """The flags of presets/NAME.yaml. Raises UserError for an unknown name."""
    if name not in presets.names():
        raise UserError(f"unknown preset '{name}'{nearest(name, presets.names())}; mt-diffusion presets lists them")
    return _parse_yaml(presets.file_of(name).read_text(encoding="utf-8"), name)


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return _parse_yaml(file.read(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except Exception as error:  # OmegaConf and PyYAML raise many kinds; all mean the same to the user
        raise UserError(f"{source}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: a YAML file of 'key: value' lines is expected")
    return content
