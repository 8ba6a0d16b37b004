"""The stage `commands`: what a user types, on tiny data: train, save, go on, draw, restore, read off, in pixels and in latents.

Chains of commands run beside each other, one process at a time each, since most of their time goes into imports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .report import ROOT
from .runner import Stage, Wrong

PATIENCE = 150.0  # seconds for a chain
DIGITS, TEST = "builtin:digits", "builtin:digits-test"
TINY = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 4 --diffusion_steps 50"
TINY += (
    " --noise_schedule cosine --learn_sigma True --global_batch_size 16 --save_interval 4 --log_interval 1 --lr 1e-3"
)
JUDGE = (
    "--image_size 8 --classifier_width 64 --classifier_depth 1 --classifier_attention_resolutions 4 --num_classes 10"
)
JUDGE += " --diffusion_steps 50 --noise_schedule cosine --global_batch_size 16 --save_interval 4 --log_interval 1"
UNET, STAGE = "model.params.unet_config.params", "model.params.first_stage_config.params"


def pixels() -> dict[str, list[str]]:
    """{chain: its commands}; {} stands for the chain's folder."""
    data = f"--data_dir {DIGITS}"
    any_form = f"train --mt_task masked,label --mt_variant any --mt_drop_prob 0.1 {data} --log_dir {{}}/any {TINY}"
    given = "sample --model_path {}/any --num_samples 8 --steps 5 --given label=3 --guidance_scale 2"
    compiled = f"train --mt_task label --mt_variant U --mt_encoder_refresh 4 {data} --log_dir {{}}/fp16 {TINY}"
    return {
        "masked and label, bf16": [
            f"{any_form} --precision bf16 --total_steps 4",
            f"{any_form} --precision bf16 --total_steps 8 --sample_interval 8",
            given,
            f"restore --model_path {{}}/any --data_dir {TEST} --num_samples 8 --steps 5 --mask half",
            f"classify --model_path {{}}/any --data_dir {TEST} --num_samples 40 --draws 1",
        ],
        "label, fp16, compiled": [
            f"{compiled} --precision fp16 --compile True --total_steps 8",
            "sample --model_path {}/fp16 --num_samples 8 --steps 5 --compile True --out {}/samples.npz",
        ],
        "classifier, bounds": [
            f"classifier-train {data} --val_data_dir {TEST} --log_dir {{}}/judge {JUDGE} --iterations 6",
            f"train --mt_task none --class_cond True --num_classes 10 {data} --log_dir {{}}/none {TINY} --total_steps 6",
            "classifier-sample --model_path {}/none --classifier_path {}/judge --num_samples 4 --steps 5 --class 7",
            f"nll --model_path {{}}/none --data_dir {TEST} --num_samples 4 --timestep_respacing 5",
        ],
    }


def latents() -> dict[str, list[str]]:
    """Likewise, of pairs of images in the chain's folder."""
    data = "data.params.path={}/pairs data.params.image_size=16 data.params.batch_size=4 run.save_interval=4 run.log_interval=1"
    data += " lightning.trainer.accelerator=cuda"
    layers = ["ch=32", "ch_mult=[1,1]", "norm_groups=8"]
    inner = " ".join(f"{STAGE}.ddconfig.{word}" for word in layers)
    own = " ".join(f"model.params.ddconfig.{word}" for word in layers)
    latent = f"{data} model.params.image_size=8 {UNET}.image_size=8 {inner} {UNET}.model_channels=32 {UNET}.channel_mult=[1,1]"
    configs = "latent_mt/configs"
    train = f"latent-train --config {configs}/daynight_mt.yaml {latent} data.params.latents={{}}/latents"
    train += f" {STAGE}.ckpt_path={{}}/autoencoder run.log_dir={{}}/run lightning.trainer.precision=bf16-mixed"
    return {
        "latents": [
            f"autoencoder-train --config {configs}/autoencoder_kl_daynight.yaml {data} {own} run.log_dir={{}}/autoencoder "
            "run.total_steps=4",
            f"encode --config {configs}/daynight_mt.yaml --out {{}}/latents --first_stage {{}}/autoencoder {latent}",
            f"{train} run.total_steps=4",
            f"{train} run.total_steps=8 run.sample_interval=8",
            "latent-sample --model_path {}/run --given day --steps 5",
            "latent-sample --model_path {}/run --num_samples 4 --steps 5 --precision bf16 --out {}/bf16",
        ],
    }


def write_pairs(folder: Path) -> None:
    """Images side by side, for training and validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for k in range(count):
            day = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(np.concatenate([day, day // 4], axis=1)).save(folder / split / f"{k}.png")


class Chain:
    """Commands after each other, in a thread."""

    def __init__(self, folder: Path, commands: Sequence[str]):
        self.folder, self.commands, self.wrong = folder, commands, ""
        self.seconds: list[float] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.process: subprocess.Popen | None = None
        self.stopped = False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_pairs(folder / "pairs")
        self.thread.start()

    def _run(self) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        for command in self.commands:
            words = [
                sys.executable,
                "-c",
                "from mt_diffusion.console import main; main()",
                *command.replace("{}", str(self.folder)).split(),
            ]
            start, log = time.monotonic(), self.folder / f"log_{len(self.seconds)}"
            with open(log, "w") as file:
                self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                code = self.process.wait()
            self.seconds.append(time.monotonic() - start)
            if code or self.stopped:
                lines = [line for line in log.read_text().splitlines() if line.strip()]
                self.wrong = f"{command.split()[0]} ended with {code}: {(lines or ['no word'])[-1][:400]}"
                return

    def end(self) -> None:
        """Whatever still runs."""
        self.stopped = True
        if self.process is not None:
            self.process.kill()


def run(stage: Stage) -> None:
    """All chains beside each other, and the verdict of each. On a CPU none, since there `make smoke` runs the same commands."""
    if stage.tiny:
        stage.leave_out("commands", "needs cuda; make smoke runs them on a CPU")
        return
    wanted = {**pixels(), **latents()}
    chains = {name: Chain(stage.folder / name.split(",")[0].replace(" ", "_"), each) for name, each in wanted.items()}
    try:
        for name, chain in chains.items():
            stage.check(f"commands: {name}", lambda chain=chain: said(chain, stage), 0.0)
    finally:
        for chain in chains.values():
            chain.end()


def said(chain: Chain, stage: Stage) -> dict[str, Any]:
    """How many commands ran, and their seconds. Raises Wrong with the last line of the one that failed."""
    chain.thread.join(max(1.0, min(PATIENCE, stage.run.left())))
    if chain.thread.is_alive():
        raise Wrong(f"still at command {len(chain.seconds) + 1} of {len(chain.commands)}")
    if chain.wrong:
        raise Wrong(chain.wrong)
    return {"commands": len(chain.seconds), "longest s": max(chain.seconds)}
