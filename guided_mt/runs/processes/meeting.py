"""The first thing that several processes do: find each other, and check that they are of one run.

Rank 0 keeps a store at MASTER_ADDR:MASTER_PORT (torchrun's agent has one already). Every process enters itself; rank 0 looks
whether all are there, each once, each with a GPU of its own, and writes down what it found. Whoever waits says for whom.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from ...errors import ProcessError, UserError
from .launcher import Started

SCHEME = "mt-diffusion"  # of the address by which torch calls this file
PATIENCE = 10.0  # seconds before a process says for whom it waits
REPEAT = 60.0  # seconds until it says so again
LIMIT = 300.0  # seconds until it gives up
_LOOK = 0.1  # seconds between looks


@dataclass(frozen=True)
class Member:
    """What a process says of itself. gpu: which one it would use, where it sees one alone."""

    host: str
    pid: int
    world_size: int
    gpu: str = ""


class Meeting:
    """One process's side of it; `hosts` are those of all ranks, from `rendezvous` on."""

    def __init__(self, found: Started, gpu: str = ""):
        self.found = found
        self.me = Member(socket.gethostname(), os.getpid(), found.world_size, gpu)
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.hosts: list[str] = []

    def rendezvous(self) -> Iterator[tuple[dist.Store, int, int]]:
        """(store, rank, world size), as torch wants it. Raises UserError, and ProcessError for what this process alone knows."""
        rank, world = self.found.rank, self.found.world_size
        store = dist.PrefixStore(f"{SCHEME}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", self._store())
        store.set(f"rank/{rank}", json.dumps(asdict(self.me)))
        if rank == 0:
            self._wait(lambda: _missing(store, world))
            members = [Member(**json.loads(store.get(f"rank/{other}"))) for other in range(world)]
            wrong = disagreement(members)
            store.set("roster", json.dumps({"members": [asdict(member) for member in members], "wrong": wrong}))
        else:
            # Rank 0 speaks of the others; where it has not come itself, somebody has to speak of it.
            self._wait(lambda: [] if store.check(["roster"]) else [0], quiet=lambda: store.check(["rank/0"]))
            content = json.loads(store.get("roster"))
            members, wrong = [Member(**member) for member in content["members"]], content["wrong"]
            if not wrong and (rank >= len(members) or members[rank] != self.me):
                raise ProcessError(
                    f"rank {rank} of {world} reached other processes than its own at {self.host}:{self.port}, where another run "
                    "meets: set MASTER_PORT to a free port"
                )
        if wrong:
            raise UserError(wrong)
        self.hosts = [member.host for member in members]
        yield store, rank, world

    def _store(self) -> dist.Store:
        """The server's side on rank 0, unless torchrun's agent has it; else a client's, once there is an answer."""
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = self.found.rank == 0 and not served
        if not serves:
            self._wait(lambda: [] if _answers(self.host, self.port) else [0])
        try:
            return dist.TCPStore(
                self.host,
                self.port,
                self.found.world_size,
                is_master=serves,
                timeout=datetime.timedelta(seconds=LIMIT),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise ProcessError(
                f"rank {self.found.rank} can't {'open' if serves else 'reach'} {self.host}:{self.port}, where the processes meet: "
                f"another run may use it ({str(error).splitlines()[0][:160]}); set MASTER_PORT to a free port"
            ) from None

    def _wait(self, absent: Callable[[], Sequence[int]], quiet: Callable[[], bool] = lambda: False) -> None:
        """Until no rank is `absent`. One process per machine says for whom it waits. Raises ProcessError at the limit."""
        began, spoken = time.monotonic(), 0.0
        while missing := absent():
            waited = time.monotonic() - began
            who = f"rank {self.found.rank} of {self.found.world_size}"
            whom = f"at {self.host}:{self.port} for {_named(missing)}"
            if waited > LIMIT:
                raise ProcessError(
                    f"{who} waited {waited:.0f} s {whom}, in vain: were all processes started, and can they reach this address?"
                )
            if waited > (spoken + REPEAT if spoken else PATIENCE) and self.found.local_rank <= 0 and not quiet():
                print(f"{who} waits {whom}", file=sys.stderr, flush=True)
                spoken = waited
            time.sleep(_LOOK)


def _missing(store: dist.Store, world: int) -> list[int]:
    return [rank for rank in range(world) if not store.check([f"rank/{rank}"])]


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def disagreement(members: Sequence[Member]) -> str:
    """What keeps these processes, by rank, from being one run; '' where nothing does."""
    for rank, member in enumerate(members):
        if member.world_size != len(members):
            return (
                f"rank 0 on {members[0].host} was told of {len(members)} processes, rank {rank} on {member.host} of "
                f"{member.world_size}: start them all by one command"
            )
    for gpu in {member.gpu for member in members if member.gpu}:
        ranks = [rank for rank, member in enumerate(members) if member.gpu == gpu]
        if len(ranks) > 1:
            return (
                f"{_named(ranks)} on {members[ranks[0]].host} see the same single GPU, and need one each: start fewer processes, "
                "show each its own, or use --device cpu (lightning.trainer.accelerator=cpu)"
            )
    return ""


# ---------------------------------------------------------------- torch's door

_meetings: list[Meeting] = []  # the one that torch is asked to hold


def _handler(url: str, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    return _meetings[-1].rendezvous()


if dist.is_available():
    dist.register_rendezvous_handler(SCHEME, _handler)


def meet(found: Started, backend: str, gpu: str = "") -> list[str]:
    """Join the process group of `found.world_size` processes; returns the hosts by rank. MASTER_ADDR and MASTER_PORT are set.

    gpu: as of `Member`. Raises UserError where the processes are not one run, and ProcessError where the others don't come.
    """
    meeting = Meeting(found, gpu)
    _meetings.append(meeting)
    try:
        dist.init_process_group(backend, init_method=f"{SCHEME}://", rank=found.rank, world_size=found.world_size)
    finally:
        _meetings.pop()
    return meeting.hosts
