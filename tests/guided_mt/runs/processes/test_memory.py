"""Freed memory stays with the process, counted in page faults."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from guided_mt.runs.processes import memory

LARGE = 80 * 2**20  # bytes: more than glibc keeps by itself
PAGE = 4096


def has_mallopt() -> bool:
    import ctypes

    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not has_mallopt(), reason="another allocator than glibc's")
def test_a_second_tensor_finds_the_first_ones_memory(monkeypatch):
    import resource

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    memory.keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"  # what the user has set stays
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(LARGE, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < LARGE / PAGE / 10  # another object may have taken a piece of it in between


@pytest.mark.parametrize("lacking", ["platform", "function"])
def test_other_systems_are_left_alone(lacking, monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object() if lacking == "function" else pytest.fail("asked"))
    monkeypatch.setattr(memory.sys, "platform", "linux" if lacking == "function" else "win32")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    memory.keep_freed_memory()


def test_an_older_glibc_keeps_smaller_blocks(monkeypatch):
    asked = []

    class Libc:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return int(value <= memory.OLD_LIMIT)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    memory.keep_freed_memory()
    assert asked[-1] == (memory.M_MMAP_THRESHOLD, memory.OLD_LIMIT)
