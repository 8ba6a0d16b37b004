"""`lightning.trainer` of LDM's YAML files in the terms of today's pl.Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from guided_mt.errors import UserError, nearest

from .targets import mapping

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
    given = dict(mapping(config.get("lightning") or {}, "trainer", "lightning"))
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
