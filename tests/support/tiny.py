"""Tiny runs for the end-to-end tests: their flags, how to start them, and what to read from a run's folder."""

from __future__ import annotations

import contextlib
import csv
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from safetensors.torch import load_file

from guided_mt.data import open_source
from guided_mt.networks.create import create_model
from guided_mt.networks.unet import UNetModel

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODEL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8"}
TRANSFORMER = {
    "dit_patch_size": 2,
    "dit_hidden_size": 32,
    "dit_depth": 2,
    "dit_num_heads": 2,
}  # in the place of the U-Net
PROCESS = {"diffusion_steps": 40, "noise_schedule": "cosine", "learn_sigma": True}
TRAINING = {"data_dir": "builtin:digits", "global_batch_size": 8, "log_interval": 1, "device": "cpu"}
DIGITS = 1437  # images of builtin:digits
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # Open MPI asks root to say so
TIMEOUT = 480  # seconds; a loaded machine starts torch slowly
NOT_LOSSES = ("images_per_second",)  # the one column of progress.csv that depends on the clock


def network_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a tiny network of the backbone that `values` name."""
    return {"image_size": 8, **TRANSFORMER} if values.get("mt_backbone") == "dit" else MODEL


def flags(**values: Any) -> list[str]:
    """Command-line words of a tiny masked-image run, `values` over its settings."""
    settings = {**network_flags(values), **PROCESS, "mt_task": "masked", **TRAINING, **values}
    return words(**settings)


def task_flags(tasks: str, folder: Path) -> dict[str, Any]:
    """Flags by name that modalities of `tasks` have no default for, on builtin:digits; their files are written to `folder`."""
    found: dict[str, Any] = {}
    if "label" in tasks:
        found["num_classes"] = 10
    if "caption" in tasks:
        found["caption_template"] = "the digit {class}"
    if "representation" in tasks:
        found["representation_file"] = file = folder / "vectors.npz"
        if not file.exists():
            np.savez(file, representation=np.random.default_rng(0).normal(size=(DIGITS, 5)).astype(np.float32))
    if "paired" in tasks:
        found["paired_dir"] = negatives(folder)
    return found


def negatives(folder: Path, left_out: int = 0) -> Path:
    """An .npz of the negatives of builtin:digits, under the same names; without the last `left_out`."""
    file = folder / f"negatives_{left_out}.npz"
    if not file.exists():
        source = open_source("builtin:digits")
        images = np.stack([255 - source.read(i) for i in range(DIGITS - left_out)])
        np.savez(file, arr_0=images, arr_1=source.labels[: DIGITS - left_out])
    return file


def words(**values: Any) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def start(script: str, argv: Iterable[str], launcher: Iterable[str] = (), **env: str) -> subprocess.Popen:
    """A script of scripts/, as `start_python`."""
    return start_python(ROOT / "scripts" / script, argv, launcher, **env)


def start_python(
    file: Path, argv: Iterable[str], launcher: Iterable[str] = (), **env: str
) -> subprocess.Popen | warm.Started:
    """A Python file as a process group of its own, with one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **AS_ROOT, **env}
    if not launcher:
        return warm.Started(file, list(argv), environment)
    command = [*launcher, sys.executable, str(file), *argv]
    if Path(next(iter(launcher))).name == "torchrun":
        command.remove(sys.executable)
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen | warm.Started) -> str:
    """Wait for success; returns what it printed."""
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


def free_ports(count: int) -> list[int]:
    """Ports in a row that are free, below those that the system gives to connections: so none is taken before it is used."""
    while True:
        first = 20000 + secrets.randbelow(12000)
        found = list(range(first, first + count))
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in found:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return found


def finish_group(script: str, argv: Iterable[str], processes: int = 2) -> str:
    """A script of scripts/ on several processes that have torchrun's environment; returns what they printed, rank by rank."""
    port = free_ports(64)[-1]  # many_commands counts down from it
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    argv = list(argv)
    members = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, **common}
        members.append(start(script, argv, **{name: str(value) for name, value in own.items()}))
    return "".join(map(finish, members))


def mpiexec(processes: int) -> list[str]:
    """The launcher's words; skips the test where Open MPI or mpi4py is missing (the extra `mpi`)."""
    pytest.importorskip("mpi4py", reason="needs the extra 'mpi'")
    if not (BIN / "mpiexec").exists():
        pytest.skip("needs the mpiexec of the extra 'mpi'")
    return [str(BIN / "mpiexec"), "--oversubscribe", "-n", str(processes)]


def torchrun(processes: int) -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(processes)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | warm.Started) -> None:
    """Until `condition`; fails when the process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def progress(run: Path) -> list[dict[str, str]]:
    """The rows of progress.csv without the columns that depend on the clock."""
    with open(run / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in NOT_LOSSES} for row in csv.DictReader(file)]


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in progress(run)]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def contents(checkpoint: Path) -> dict[str, Any]:
    """Every file of a checkpoint folder by name: state dicts of tensors, or bytes."""
    found: dict[str, Any] = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            found[file.name] = load_file(str(file))
        elif file.suffix == ".pt":
            found[file.name] = torch.load(file, weights_only=True)
        else:
            found[file.name] = file.read_bytes()
    return found


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_near(
    wanted: list[dict[str, str]], found: list[dict[str, str]], *, rel: float, loose: tuple[str, ...], loose_rel: float
) -> None:
    """Rows of two progress.csv alike to rounding; columns that begin with one of `loose` to `loose_rel`."""
    assert len(wanted) == len(found)
    for row, other in zip(wanted, found, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            near = {"rel": loose_rel, "abs": 1e-5} if name.startswith(loose) else {"rel": rel, "abs": 1e-9}
            assert float(other[name] or "nan") == pytest.approx(float(value or "nan"), **near, nan_ok=True), name


def adm_unet(seed: int = 0, **values: Any) -> UNetModel:
    """A plain U-Net of the tiny runs' size with no zero-initialised layers, as a trained one has none."""
    torch.manual_seed(seed)
    unet = create_model(**{**MODEL, "learn_sigma": True, "num_heads": 4, "use_scale_shift_norm": True, **values})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return unet.eval()
