"""Training of a LatentMTDiffusion: Algorithm 2 on latents, its figures and its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from guided_mt.data import Batch
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.generation.batches import load_beside
from guided_mt.modalities import Images
from guided_mt.modalities.settings import absent_names
from guided_mt.modalities.weighting.on_gradients import gramian_of, outputs_of
from guided_mt.modalities.weighting.settings import Weighting
from guided_mt.networks.layers import Block
from guided_mt.runs import checkpoint
from guided_mt.runs.processes.shards import gathered, shard, total_norm
from guided_mt.training.averages import QUARTILES, Averages
from guided_mt.training.objective import figures_of
from guided_mt.training.optim import guard_step
from guided_mt.training.record import Record
from guided_mt.training.units import batches_to_measure, measure_units
from guided_mt.training.variances import learn_variances

from ..data.validation import val_batches
from ..model.generate import preview_grid
from ..model.latent_diffusion import LatentMTDiffusion
from ..runs.ldm_checkpoint import COND_STAGE, leave_out
from ..runs.targets import instantiate
from ..runs.trained_module import TrainedModule

SCALE_BATCHES = 8  # of all processes, on which `scale_by_std` measures
VAL_TIMESTEPS = 8  # evenly spaced, per validation image


class LatentTraining(TrainedModule):
    """Trains `model`; see trained_module.TrainedModule for how it is driven. Raises UserError for a bad scheduler_config."""

    prefix = "model."
    shardable = True

    def __init__(self, model: LatentMTDiffusion):
        super().__init__()
        self.model = model
        self.weighting = Weighting(model.config, model.diffusion)
        if model.scheduler_config is not None:
            self.schedule = instantiate(model.scheduler_config, "model.params.scheduler_config")
        self.fused = True

    @property
    def averaged(self) -> nn.Module:
        """The module whose weights are averaged: the U-Net with its heads, without first stage and conditioner."""
        return self.model.model

    @property
    def ema_rates(self) -> list[str]:
        """Rates of the averages as text; none with `use_ema: false`."""
        return super().ema_rates if self.model.use_ema else []

    # ------------------------------------------------------------ a step

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            if self.dropout:
                self.seed_dropout()
            for modality in self.model.modalities.values():
                modality.before_step(self.steps_done, self.processes)
        self._load_beside(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._measure_tasks(batch)
        losses, t = self.model.losses(batch, self._streams(batch), weighting=self.weighting)
        values = {"loss": losses.loss, **{name: losses.terms[name] for name in self.model.terms}}
        values |= {f"rms_{name}": losses.encoding_rms[name] for name in self.encoded} | losses.figures
        values |= {"role": losses.role.float()}
        self._track(Record.of(t, values, losses.predicted))
        return self.model.l_simple_weight * losses.loss.mean()

    def _streams(self, batch: Batch) -> SampleStreams:
        return SampleStreams(self.run.seed, batch.positions, device=batch.positions.device)

    def _measure_tasks(self, batch: Batch) -> None:
        """The tasks' weights of the coming steps where they rest on gradients: those of a step's first batch, on all processes."""
        weighting = self.weighting.on_gradients
        if weighting is None or self.steps_done % self.model.config.mt_task_weighting_interval:
            return
        with outputs_of(self.model.network.trunk) as features:
            losses, _ = self.model.losses(batch, self._streams(batch), weighting=self.weighting)
        objectives = {task: losses.objectives[task].mean() for task in weighting.tasks}
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        gramian = gramian_of(objectives, features[-1], *([] if scaler is None else [scaler.scale]))
        weighting.measure(self.processes.mean(gramian), seed=self.run.seed + self.steps_done)
        if self.dropout:
            self.seed_dropout()

    @torch.no_grad()
    def _track(self, record: Record) -> None:
        self.averages.add(record)
        learn_variances(self.model.network, record, self.model.modality_names, self.processes)

    @property
    def encoded(self) -> list[str]:
        """The modalities whose encodings in the frame are the network's own, of which size and spread are measured."""
        in_frame = self.model.modalities.items() if self.model.network.variant != "X" else ()
        return [name for name, modality in in_frame if modality.has_spread]

    @property
    def dropout(self) -> bool:
        """Whether the network drops anything, so that its generator has to be seeded in each step."""
        return any(module.p > 0 for module in self.model.network.modules() if isinstance(module, nn.Dropout))

    @override
    def shard(self, device_type: str) -> None:
        if self.weighting.parameter_groups() or self.weighting.on_gradients is not None:
            raise UserError(
                "lightning.trainer.strategy fsdp: weights that are learned (mt_timestep_weights learned, mt_task_weighting "
                "uncertainty) or measured (pcgrad, nash) need whole replicas; take strategy: ddp, or fixed weights"
            )
        outside = [name for name, modality in self.model.modalities.items() if modality.reads_weights]
        if outside:
            raise UserError(
                f"lightning.trainer.strategy fsdp: {', '.join(outside)} reads weights between the network's passes, which needs "
                "them whole; take strategy: ddp"
            )
        shard(self.model.network, Block, device_type, ["encode_modality"])
        stage = getattr(self.model, "cond_stage_model", None)
        if isinstance(stage, nn.Module) and any(p.requires_grad for p in stage.parameters()):
            shard(stage, Block, device_type)
        self.model.bind()  # what encodes is another function now

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in self.model.parameters() if p.requires_grad]},
            *self.weighting.parameter_groups(),
        ]
        # The scaler of 16-mixed wants to unscale the gradients itself.
        self.fused = self.trainer.precision != "16-mixed"
        return torch.optim.AdamW(groups, lr=self.base_rate, weight_decay=self.run.weight_decay, fused=self.fused)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rate(self.steps_done) if group.get("own_lr") is None else group["own_lr"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.fused:
            norm, bad = guard_step(optimizer, grads, self.run.grad_clip)
        else:  # the scaler has unscaled the gradients, and it is the scaler that skips
            norm = total_norm(grads)
            bad = (~torch.isfinite(norm)).float()
            if self.run.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.run.grad_clip, norm, foreach=True)
        self.count(bad)
        self.averages.add_scalars({"grad_norm": norm})
        self.steps_done += 1

    # ------------------------------------------------------------ the run (see trained_module.TrainedModule)

    @override
    def prepare(self, data: Any, resumed: bool) -> None:
        precisions = {"bf16-mixed": "bf16", "16-mixed": "fp16"}
        self.model.network.precision = precisions.get(self.trainer.precision, self.model.network.precision)
        # Parts of weights are contiguous, as torch's FSDP wants them.
        (self.model.first_stage_model if self.sharded else self.model).to_fast_layout()
        super().prepare(data, resumed)
        self.model.random_flip = data.random_flip
        self.model.first_stage_model.eval()
        self._prepare_modalities(data)
        self.averages = Averages(
            ["loss", *self.model.terms, *(f"rms_{name}" for name in self.encoded), *self.figures],
            self.model.diffusion.num_timesteps,
            self.processes,
        )
        if not self.model.scale_known and not resumed:
            self._measure_scale(data)
        self._measure_units(data)

    def _prepare_modalities(self, data: Any) -> None:
        """Show them the data. Raises UserError where some of the data lack a modality and the file doesn't say so."""
        network, declared = self.model.network, absent_names(self.model.config)
        for name, modality in self.model.modalities.items():
            modality.prepare(data.source)
            undeclared = modality.partly and name not in declared
            if data.val_source is not None and not modality.loads:
                modality.prepare(data.val_source)
            told = name in network.indicated or name in network.context_in
            if undeclared or (modality.partly and not told):
                raise UserError(
                    f"model.params.mt_tasks.{name}: some of the data have none of it; write absent: true there, so that the "
                    "network is told which"
                )

    def _measure_scale(self, data: Any) -> None:
        """LDM's `scale_by_std`: 1 / the latents' standard deviation, here over several batches and before the first step."""
        self.model.scale_factor.fill_(1.0)
        sums = torch.zeros(3, device=self.device, dtype=torch.float64)
        for images in self._first_images(data, SCALE_BATCHES):
            for z in (images.x_start, *images.sides.values()):
                z = z.double()
                sums += torch.stack([torch.ones_like(z).sum(), z.sum(), z.square().sum()])
        count, total, squares = sums.unbind()
        self.model.scale_factor.fill_(1 / (squares / count - (total / count) ** 2).sqrt())
        self.model.scale_known = True

    def _measure_units(self, data: Any) -> None:
        """The units of modalities that have some, where no checkpoint knows them."""
        modalities = self.model.modalities
        if any(modality.unmeasured for modality in modalities.values()):
            batches = batches_to_measure(self.run.images_per_step)
            measure_units(modalities, self._first_images(data, batches))

    def _first_images(self, data: Any, steps: int) -> Iterator[Images]:
        """The images of the run's first steps, those of all processes, as training sees them."""
        batches = steps * self.run.images_per_step // data.batch_size  # of one process, which sees them all
        with data.stream_of_all(seed=self.run.seed, world_size=self.processes.world_size, batches=batches) as stream:
            for batch in stream:
                self._load_beside(batch)
                batch = batch.to(self.device)
                yield self.model.images(batch, SampleStreams(self.run.seed, batch.positions, device=self.device))

    def _load_beside(self, batch: Batch) -> None:
        for name, beside in load_beside(self.model.modalities, batch.indices.numpy(), batch.captions).items():
            batch.loaded[name] = beside.to(self.device, non_blocking=True)

    @property
    def figures(self) -> list[str]:
        """Columns of what is logged of the heads' predictions beside their loss."""
        return list(figures_of(self.model.modalities))

    @override
    def columns(self) -> list[str]:
        names = ["loss", *self.model.terms, *self.figures]
        quartiles = [f"{name}_q{q}" for name in names for q in range(QUARTILES)]
        val = [f"val_{name}" for name in names] if self.run.val_interval else []
        encoded = [f"{what}_{name}" for what in ("rms", "spread") for name in self.encoded]
        return [*names, *val, *encoded, *self.weighting.columns(), "grad_norm", "lr", "skipped_steps", *quartiles]

    @override
    def report_row(self) -> dict[str, float]:
        modalities = self.model.modalities
        spread = {f"spread_{name}": float(modalities[name].encoding_spread(self.device)) for name in self.encoded}
        factors = self.weighting.over_tasks.factors()
        weights = {} if factors is None else dict(zip(self.weighting.columns(), factors.tolist(), strict=True))
        return {**self.averages.pop(), **spread, **weights, "lr": self.rate(self.steps_done - 1)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean losses of the averaged weights on the validation split, at evenly spaced timesteps and with fixed noise."""
        names = ["loss", *self.model.terms, *self.figures]
        totals = torch.zeros(2, len(names), device=self.device)
        flip, self.model.random_flip = self.model.random_flip, False
        with self.with_averages(), self._encoding_anew():
            for batch in val_batches(self.data):
                batch = self._without_files(batch.to(self.device))
                for k in range(VAL_TIMESTEPS):
                    t = torch.full_like(
                        batch.positions, int((k + 0.5) * self.model.diffusion.num_timesteps / VAL_TIMESTEPS)
                    )
                    losses, _ = self.model.losses(batch, SampleStreams(batch.positions, 1 + k, device=self.device), t)
                    found = {"loss": losses.loss, **losses.terms, **losses.figures}
                    values = torch.stack([found[name] for name in names])
                    kept = torch.stack([losses.predicted.get(name, torch.ones_like(losses.loss)) for name in names])
                    totals += torch.stack([(values * kept).sum(1), kept.sum(1)])
        self.model.random_flip = flip
        means = (totals[0] / totals[1]).tolist()
        return {f"val_{name}": mean for name, mean in zip(names, means, strict=True)}

    def _without_files(self, batch: Batch) -> Batch:
        """A batch of validation with those modalities absent whose files are beside the training images, and with what its own data
        hold of the others."""
        streams = SampleStreams(batch.positions, device=self.device)
        source, indices = self.data.val_source or self.data.source, batch.indices.cpu().numpy()
        for name, modality in self.model.modalities.items():
            stored = modality.load_of(source, indices)
            if stored is not None:
                batch.loaded[name] = stored.to(self.device)
                if (held := modality.has(batch.loaded[name])) is not None:
                    batch.present[name] = held
            elif modality.loads:
                batch.loaded[name] = modality.prior(self.model.shape, streams)
                batch.present[name] = torch.zeros_like(batch.positions, dtype=torch.bool)
        return batch

    @contextlib.contextmanager
    def _encoding_anew(self) -> Iterator[None]:
        """Inside, modalities don't use encodings that were kept from the weights of training (`mt_encoder_refresh`)."""
        kept = {name: modality.state_dict() for name, modality in self.model.modalities.items()}
        for modality in self.model.modalities.values():
            modality.load_state_dict({})
        try:
            yield
        finally:
            for name, modality in self.model.modalities.items():
                modality.load_state_dict(kept[name])

    @override
    def preview(self) -> np.ndarray | None:
        with self.with_averages(), self._encoding_anew():
            return preview_grid(self.model, self.data)

    # ------------------------------------------------------------ checkpoints

    @override
    def weights(self) -> dict[str, dict[str, Tensor]]:
        state = gathered(self.model.state_dict())
        averages = {
            f"ema_{rate}": {**state, **{f"model.{k}": v for k, v in self.ema.state_dict(rate, self.averaged).items()}}
            for rate in self.ema.averages
        }
        return {"model": state, **averages}

    @override
    def load_weights_of(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        if isinstance(stage := getattr(self.model, "cond_stage_model", None), nn.Module):
            names = (key for key in checkpoint.read_weights(file) if key.startswith(COND_STAGE))
            leave_out(stage, [name.removeprefix(COND_STAGE) for name in names])
        checkpoint.load_weights(self.model, file)
        self.model.scale_known = True
        self.load_averages(folder)

    @override
    def run_state(self) -> dict[str, Any]:
        modalities = {name: modality.state_dict() for name, modality in self.model.modalities.items()}
        weighting = self.weighting.state_dict()
        state = {"averages": self.averages.state_dict(), "modalities": modalities}
        return {**state, "weighting": weighting} if weighting else state

    @override
    def load_run_state(self, state: Mapping[str, Any]) -> None:
        self.averages.load_state_dict(state["averages"])
        for name, saved in state.get("modalities", {}).items():
            self.model.modalities[name].load_state_dict({key: x.to(self.device) for key, x in saved.items()})
        self.weighting.load_state_dict(state.get("weighting", {}))
