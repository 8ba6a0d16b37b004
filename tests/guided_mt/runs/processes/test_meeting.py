"""Processes that meet: they find each other, or say for whom they wait, and why they are not one run. Each is a thread here."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from guided_mt.errors import ProcessError, UserError
from guided_mt.runs.processes import meeting
from guided_mt.runs.processes.launcher import Started
from guided_mt.runs.processes.meeting import Meeting, Member, disagreement


@pytest.fixture
def port(monkeypatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free))
    return free


def met(ranks: dict[int, int], gpu: str = "", hosts: dict[int, str] | None = None) -> dict[int, Any]:
    """{rank: the hosts that it found, or its error} of threads; ranks: {rank: the world size that it was told}."""
    found: dict[int, Any] = {}
    stores = []

    def join(rank: int, world: int) -> None:
        try:
            one = Meeting(Started("torchrun", rank, world, rank, len(ranks)), gpu)
            if hosts:
                one.me = Member(hosts[rank], rank, world, gpu)
            stores.append(next(one.rendezvous()))
            found[rank] = one.hosts
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=join, args=pair) for pair in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_they_find_each_other_and_their_hosts(port):
    assert met({0: 3, 1: 3, 2: 3}, hosts={0: "a", 1: "b", 2: "a"}) == {rank: ["a", "b", "a"] for rank in range(3)}


def test_one_gpu_for_all_is_told_to_all(port):
    for error in met({0: 2, 1: 2}, gpu="GPU-1").values():
        assert "ranks 0, 1 on" in str(error) and "see the same single GPU" in str(error)


def test_who_waits_says_for_whom_and_gives_up(port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "PATIENCE", 0.2)
    monkeypatch.setattr(meeting, "LIMIT", 0.8)
    found = met({0: 3, 2: 3})
    assert f"rank 0 of 3 waits at 127.0.0.1:{port} for rank 1\n" in capsys.readouterr().err
    assert f"waited 1 s at 127.0.0.1:{port} for rank 1, in vain: were all processes started" in str(found[0])
    assert all(isinstance(error, ProcessError) for error in found.values())


def test_without_rank_0_the_others_say_so(port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "PATIENCE", 0.2)
    monkeypatch.setattr(meeting, "LIMIT", 0.8)
    one = Meeting(Started("slurm", 4, 8, 0, 4))
    with pytest.raises(ProcessError, match=r"rank 4 of 8 waited 1 s at .* for rank 0, in vain"):
        next(one.rendezvous())
    assert f"rank 4 of 8 waits at 127.0.0.1:{port} for rank 0" in capsys.readouterr().err


def test_a_port_in_use_is_named(port):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(ProcessError, match=rf"rank 0 can't open 127.0.0.1:{port}.* set MASTER_PORT to a free port"):
            next(Meeting(Started("torchrun", 0, 2, 0, 2)).rendezvous())


def test_processes_that_are_not_one_run():
    a, b = Member("n1", 1, 2), Member("n2", 2, 4)
    assert disagreement([a, a]) == ""
    assert "rank 0 on n1 was told of 2 processes, rank 1 on n2 of 4" in disagreement([a, b])
    assert disagreement([Member("n1", 1, 2, "GPU-1"), Member("n1", 2, 2, "GPU-2")]) == ""
