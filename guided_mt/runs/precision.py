"""bf16 on CPUs that have no instructions for it: right, and many times slower than fp32 (17 times, measured on an AVX2 machine).

Presets and YAML files ask for it, as GPUs and newer CPUs are twice as fast with it. Where they meet a CPU without, fp32 is
taken, with one line; what was typed stays, with one warning; and a run that goes on keeps the arithmetic it began with.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

import torch

from .config import Config, ModelConfig

# By the names of torch and of Linux. AMX and AVX512 are x86's; "bf16" stands among the features of ARM's.
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16", "svebf16"}


def has_instructions(names: set[str]) -> bool:
    """Whether a CPU with these features computes in bf16."""
    return bool(names & _INSTRUCTIONS)


def features_of(cpuinfo: str) -> set[str]:
    """The features that /proc/cpuinfo lists: `flags` on x86, `Features` on ARM."""
    lines = [line.partition(":")[2] for line in cpuinfo.splitlines() if line.lower().startswith(("flags", "features"))]
    return set(lines[0].split()) if lines else set()


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has them, as torch, Linux or macOS tells; where none can tell, it has not."""
    known = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that is supported
    names = {name for name, there in known().items() if there is True} if known is not None else set()
    file = Path("/proc/cpuinfo")
    if not has_instructions(names) and file.exists():
        names |= features_of(file.read_text(errors="replace"))
    if platform.system() == "Darwin":
        words = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        if subprocess.run(words, capture_output=True, text=True).stdout.strip() == "1":
            names.add("bf16")
    return has_instructions(names)


def is_slow(precision: str, device: torch.device) -> bool:
    """Whether this precision (bf16, bf16-mixed, fp32, ...) is one that the device only imitates."""
    return device.type == "cpu" and precision.startswith("bf16") and not cpu_has_bf16()


def settle(config: Config, device: torch.device, own: str = "") -> list[str]:
    """Choose the network's precision for this device; returns lines to print. own: that of the run that goes on, '' for none."""
    typed = "precision" in config.words or "use_fp16" in config.words
    chosen, lines = choose(config.precision, device, typed=typed, own=own)
    config[ModelConfig].precision = chosen
    return lines


def choose(
    wanted: str, device: torch.device, *, typed: bool, own: str = "", fp32: str = "fp32"
) -> tuple[str, list[str]]:
    """(the precision to take, lines to print). typed: the user asked for it on the command line; fp32: how it is written."""
    said: list[str] = []
    if own and not typed:
        said = [f"precision {own}, as the run began"] if own != wanted else []
        wanted, typed = own, True
    if not is_slow(wanted, device):
        return wanted, said
    if typed:
        said.append(
            f"warning: {wanted} on this CPU, which has no instructions for it, is many times slower than {fp32}"
        )
        return wanted, said
    return fp32, [f"precision {fp32} and not {wanted}, for which this CPU has no instructions"]
