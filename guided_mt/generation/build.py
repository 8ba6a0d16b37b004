"""Everything that is built from a whole configuration: network, process and modalities, and what it must agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..data import MAX_PIXELS, ImageSource, open_source
from ..data.sides import Sides
from ..diffusion.aggregation import WEIGHTS
from ..diffusion.network import Told
from ..diffusion.process import GaussianDiffusion
from ..diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from ..diffusion.schedules import get_named_beta_schedule
from ..errors import UserError, nearest
from ..modalities import Modality, Pixels, Space
from ..modalities.registry import TASKS
from ..modalities.roles import variance_name
from ..modalities.row_config import RowConfig, split_names
from ..modalities.settings import (
    MTConfig,
    absent_names,
    encoding_norm,
    loss_weights,
    roles_of,
    routing_of,
    row_config,
    row_of,
    task_names,
    variant_of,
    weights_names,
)
from ..modalities.tokens import rescaled
from ..modalities.weighting.settings import WeightingConfig
from ..networks.backbone import Backbone
from ..networks.heads import HeadVariance
from ..networks.multi_task import MultiTask
from ..runs.backbones import backbone_sections, build_backbone
from ..runs.checkpoint import read_config
from ..runs.config import Config, DataConfig, DiffusionConfig, ModelConfig, check_keys
from ..runs.loop_config import AlignmentConfig, TrainConfig


def model_sections() -> tuple[type, ...]:
    """What a checkpoint has to carry so that the same network, process and modalities can be built again."""
    return (
        ModelConfig,
        DiffusionConfig,
        MTConfig,
        WeightingConfig,
        *backbone_sections(),
        *dict.fromkeys(task.options for task in TASKS.values()),
    )


def run_sections() -> tuple[type, ...]:
    """What a training run's config.yaml holds."""
    return (*model_sections(), DataConfig, TrainConfig, AlignmentConfig)


def sampling_may_change() -> set[str]:
    """Keys of `model_sections` that another value than in training makes sense for: they change no weight's meaning."""
    return {f.name for section in model_sections() for f in dataclasses.fields(section) if f.metadata["free"]}


def saved_config(weights: Path) -> dict[str, Any]:
    """The configuration beside a weights file; empty for a foreign file. Raises UserError for another kind of run,
    for a modality that isn't registered, and for a key that no run has."""
    saved, file = read_config(weights, "pixel") or {}, weights.parent / "config.yaml"
    for row in split_names(str(saved.get("mt_task", ""))).values():
        if row not in TASKS:
            raise UserError(
                f"{file}: was trained with the modality '{row}'{nearest(row, TASKS)}, which this script doesn't know; "
                "run the file that adds it to TASKS (docs/new_modality.md)"
            )
    # What later versions added, at the value that says what runs without it did.
    later = {
        "mt_backbone": "unet",
        "mt_time": "steps",
        **{key: value for section in backbone_sections() for key, value in dataclasses.asdict(section()).items()},
        "prediction": "eps",
        "predict_v": False,
        "timestep_weights": "uniform",
        "trained_timesteps": "",
        **dataclasses.asdict(WeightingConfig()),
        **dataclasses.asdict(AlignmentConfig()),
        **{
            key: value
            for key, value in dataclasses.asdict(MTConfig()).items()
            if key.startswith(("mt_routing", "mt_embedding"))
        },
    }
    saved = {**later, **saved} if saved else {}
    if "mt_loss_weight" in saved:
        saved["mt_loss_weight"] = str(saved["mt_loss_weight"])  # a number in runs of version 0.1
    known = [field.name for section in run_sections() for field in dataclasses.fields(section)]
    _check_rows(check_keys(saved, known, file), file)
    return saved


def _check_rows(saved: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where a run was trained with a row of a registry that isn't there."""
    fields = [field for section in model_sections() for field in dataclasses.fields(section) if field.name in saved]
    asked = [(f.name, str(saved[f.name]), f.metadata["choices"]) for f in fields if f.metadata["choices"]]
    weights = str(saved["mt_weights"]).split(",") if "mt_weights" in saved else []
    asked += [("mt_weights", part.rpartition("=")[2].strip(), WEIGHTS) for part in weights]
    for flag, name, rows in asked:
        if name not in rows:
            raise UserError(
                f"{file}: was trained with --{flag} {name}{nearest(name, rows)}, which this script doesn't know; "
                "run the file that adds it (docs/architecture.md)"
            )


def open_images(config: Config, class_names: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """The images of --data_dir, with those of --paired_dir beside them. Raises UserError where one can't be opened."""
    source, paired = open_source(config.data_dir, class_names=class_names, max_pixels=max_pixels), {}
    for name, side in zip(roles_of(config).slots, roles_of(config).sides[1:], strict=True):
        folder = row_config(config, name).paired_dir
        if not folder:
            raise UserError(f"--paired_dir is missing: the folder or archive with the images of --mt_task {name}")
        paired[side] = open_source(folder, max_pixels=max_pixels)
    source = Sides(source, paired, config.mt_image) if paired else source
    for name in task_names(config):
        captions = row_of(config, name).captions
        if captions is not None and source.captions is None:
            source.captions = captions(row_config(config, name), source)
    return source


def count_classes(config: Config, images: ImageSource) -> None:
    """Where labels are modelled and --num_classes was not given, it is the number of classes of the data."""
    modelled = any("num_classes" in row_of(config, name).run_options for name in task_names(config))
    if modelled and images.labels is not None and "num_classes" not in config.typed:
        config[ModelConfig].num_classes = len(images.class_names)


def fit_to_data(config: Config, images: ImageSource) -> list[str]:
    """Fill in what the flags leave open and only the training images say. Returns the lines that say so. Raises UserError."""
    lines = []
    for name in task_names(config):
        fit, own = row_of(config, name).fit, row_config(config, name)
        if fit is not None:
            before = vars(config[row_of(config, name).options]).copy()
            fit(own, images)
            after = vars(config[row_of(config, name).options])
            lines += [f"{key} {value}: that of the data" for key, value in after.items() if value != before[key]]
    return lines


def needs_labels(config: Config) -> bool:
    """Whether training reads the images' classes."""
    return config.class_cond or any(row_of(config, name).needs_labels for name in task_names(config))


def sees_plain_noise(config: Config) -> bool:
    """Whether form X with all modalities of `--mt_task` is at times trained with none of them given."""
    return all(row_of(config, name).sees_plain_noise(row_config(config, name)) for name in task_names(config))


def check_labels(config: Config, images: ImageSource) -> None:
    """Raises UserError where classes are needed and the images have none, or more than --num_classes."""
    if not needs_labels(config):
        return
    why = "--class_cond True" if config.class_cond else f"--mt_task {config.mt_task}"
    if images.labels is None:
        raise UserError(
            f"{images.path}: {why} needs classes (sub-folders, names like CLASS_0001.png, or arr_1 in an .npz), "
            f"and {images.without_class()} has none"
        )
    lacking = int((images.labels < 0).sum())
    if lacking and config.class_cond:
        raise UserError(
            f"{images.path}: {lacking} of {len(images)} images have no class, which {why} needs; leave them out"
        )
    most = len(images.class_names)
    if most > config.num_classes:
        raise UserError(f"{images.path}: has {most} classes; raise --num_classes {config.num_classes} to {most}")


def check_tasks(config: Config) -> None:
    """Raises UserError for modalities and flags that contradict each other."""
    names = task_names(config)
    loss_weights(config), weights_names(config), absent_names(config)
    if config.mt_swap_prob not in ("", "0") and not roles_of(config).slots:
        raise UserError(f"--mt_swap_prob {config.mt_swap_prob}: there is no paired image (--mt_task paired) to be z_0")
    if config.mt_embedding and all(row_of(config, name).tokens is None for name in names):
        raise UserError(f"--mt_embedding True: nothing of --mt_task {config.mt_task} enters as tokens; leave it out")
    predicted = [name for name in names if row_of(config, name).needs_labels]
    if config.class_cond and predicted:
        raise UserError(
            f"--class_cond True gives the network the class that --mt_task {predicted[0]} is to predict; leave one of them out"
        )
    if config.class_cond and roles_of(config).told:
        raise UserError(
            "--class_cond True: the network's class tells which image is z_0 (--mt_swap_prob); leave one of them out"
        )


def complete(config: Config) -> None:
    """Fill in what the flags leave open. Raises UserError for files that can't be read."""
    names, rows = task_names(config), split_names(config.mt_task)
    words = [name if name == rows[name] else f"{name}:{rows[name]}" for name in names]
    config[MTConfig].mt_task = ",".join(words) or "none"
    config[MTConfig].mt_variant = variant_of(config)
    for name in names:
        fill_in = row_of(config, name).complete
        if fill_in is not None:
            fill_in(row_config(config, name))


def build_model(config: Config, modalities: Mapping[str, Modality] | None = None) -> MultiTask:
    """The untrained network of a configuration, for `modalities` where they are built already."""
    roles = roles_of(config)
    by_role = {"class_cond": True, "num_classes": len(roles.sides)} if roles.told else {}
    made = build_backbone(
        config.mt_backbone,
        config,
        config.mt_context_dim,
        **multi_task_options(config, build_diffusion(config), Pixels(config.image_size)),
        **by_role,
        learn_sigma=config.learn_sigma,
    )
    track_variances(made, config, modalities or build_modalities(config))
    if config.mt_drop_prob == 1:
        made.freeze_context()
    return made


def multi_task_options(config: Config, process: GaussianDiffusion, space: Space) -> dict[str, Any]:
    """The keywords of `MultiTask` that a configuration says, for a network on `space`; but for its context's width."""
    rows = {name: (row_of(config, name), row_config(config, name, space)) for name in task_names(config)}
    return {
        "heads": {name: partial(_head, row.head, own, process) for name, (row, own) in rows.items()},
        "image_inputs": {name: space.channels for name, (row, _) in rows.items() if row.tokens is None},
        "token_inputs": {name: partial(row.tokens, own) for name, (row, own) in rows.items() if row.tokens is not None},
        "units": {name: size for name, (row, own) in rows.items() if (size := row.units(own))},
        "lacking": absent_names(config),
        "roles": roles_of(config).told,
        "variant": variant_of(config) if rows else "U",
        "num_timesteps": process.num_timesteps,
        "embedded": config.mt_embedding,
        "routing": routing_of(config, _last_told(process)),
        "told": _told(config, process),
    }


def _told(config: Config, process: GaussianDiffusion) -> Told | None:
    """How the network is told z_t and t (`--mt_time`); None: as they are. Raises UserError for two ways at once."""
    if config.mt_time == "steps":
        return None
    if process.rescale_timesteps:
        raise UserError(
            f"--rescale_timesteps True scales the timesteps, which --mt_time {config.mt_time} does not tell the network; "
            "leave one of them out"
        )
    return Told(config.mt_time, process.alphas_cumprod)


def _last_told(process: GaussianDiffusion) -> float:
    """What the network is told at the last of all timesteps."""
    steps = process.original_num_steps
    return (steps - 1) * (1000.0 / steps if process.rescale_timesteps else 1.0)


def _head(
    make: Callable[..., nn.Module], config: RowConfig, process: GaussianDiffusion, backbone: Backbone
) -> nn.Module:
    return make(config, backbone, process)


def track_variances(model: MultiTask, config: Config, modalities: Mapping[str, Modality]) -> None:
    """Let the network track the squared errors of heads that own head divides by.

    In form U there is one for each role, since they are larger in the direction that leaves more open."""
    roles = roles_of(config)
    each = range(len(roles.sides)) if roles.told and model.variant == "U" else range(1)
    model.track([variance_name(name, role) for role in each for name, m in modalities.items() if m.tracks_variance])


def build_diffusion(config: Config, timestep_respacing: str = "") -> GaussianDiffusion:
    """The process of a configuration, on all its timesteps or on those kept by `timestep_respacing`, trained on or not.

    Raises UserError where --diffusion_steps are too few for the schedule.
    """
    steps, schedule = config.diffusion_steps, config.noise_schedule
    most = float(get_named_beta_schedule(schedule, steps).max())
    ends_in_noise = float(get_named_beta_schedule(schedule, 1000).max()) >= 1  # of itself, as the straight path
    if most >= 1 and not ends_in_noise:  # linear: beta_T = 20 / T, and abar_T would be 0
        raise UserError(
            f"--diffusion_steps {steps} is too small for --noise_schedule {schedule}, whose last beta would be {most:.3g}; "
            f"take at least {int(steps * most) + 1}, or --noise_schedule cosine"
        )
    options: dict[str, Any] = config.as_dict(DiffusionConfig)
    options["steps"] = options.pop("diffusion_steps")
    options["timestep_respacing"] = timestep_respacing
    del options["trained_timesteps"]
    try:
        return create_gaussian_diffusion(**options, mt_weights=weights_names(config))
    except ValueError as error:  # what its formulas say of bad settings, in the words of the flags
        raise UserError(str(error)) from None


def trained_process(config: Config, timestep_respacing: str = "") -> GaussianDiffusion:
    """The process on the timesteps that the network is trained on, or on those kept of them by `timestep_respacing`.

    Raises UserError where the counts can't be had.
    """
    if not config.trained_timesteps:
        return build_diffusion(config, timestep_respacing)
    trained = build_diffusion(config, config.trained_timesteps)
    return respaced(trained, timestep_respacing) if timestep_respacing else trained


def respaced(full: GaussianDiffusion, respacing: str) -> GaussianDiffusion:
    """The process on the timesteps that `--timestep_respacing` keeps. Raises UserError where the counts can't be had."""
    try:
        return full.respace(kept_timesteps(full, respacing))
    except ValueError as error:
        raise UserError(str(error)) from None


def build_modalities(config: Config, model: MultiTask | None = None, space: Space | None = None) -> dict[str, Modality]:
    """{name: modality} of a configuration on `space` (None: pixels), bound to `model` where there is one."""
    space = space or Pixels(config.image_size)
    made = {}
    for name in task_names(config):
        made[name] = modality = row_of(config, name).modality(row_config(config, name, space), None)
        modality.name = name  # that of a row of one's own may be fixed
        modality.use_space(space)
    if model is not None:
        bind(made, config, model)
    return made


def bind(
    modalities: Mapping[str, Modality],
    config: Config,
    model: MultiTask,
    role: int = 0,
    encode: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Let modalities encode by `model`, or by `encode` in the place of its `encode_modality`, and know what became of their heads
    by now: whether they were trained, and their variances in `role`."""
    weights = loss_weights(config)
    for name, modality in modalities.items():
        modality.use_network(model)
        modality.head_trained = weights[name] > 0 and config.mt_drop_prob < 1
        if row_of(config, name).tokens is not None:
            modality.encoder = partial(_encode, encode or model.encode_modality, name, encoding_norm(config, name))
        own = variance_name(name, role)
        key = own if own in model.head_variance else name
        tracked = cast(HeadVariance, model.head_variance[key]) if key in model.head_variance else None
        if tracked is not None and not tracked.error_count.is_meta and bool(tracked.error_count.any()):
            modality.use_variance(tracked.value())


def _encode(encode: Callable[[str, Tensor], Tensor], name: str, norm: str, x: Tensor) -> Tensor:
    return rescaled(encode(name, x), norm)
