"""Processes that begin with torch and the packages imported, forked from one that imported them once: an import takes seconds,
and the suite starts programs a hundred times."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

MODULES = ["torch", "numpy", "guided_mt.commands.train", "latent_mt.commands.latent_train", "pytorch_lightning"]
ROOT = Path(__file__).resolve().parents[2]
PATH = list(sys.path)  # before tests add to it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(MODULES)
TIMEOUT = 240  # seconds; a loaded machine starts torch slowly


def _become(
    file: str, argv: Sequence[str], env: Mapping[str, str], cwd: str, output: Connection, errors: str | None
) -> None:
    """`python FILE ARGV` in a forked process: its own process group, environment, folder, path and streams."""
    os.setsid()
    os.chdir(cwd)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno() if errors is None else os.open(errors, os.O_WRONLY), 2)
    output.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [file, *argv]
    added = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [str(Path(file).parent), *added, *(place for place in PATH if place not in added)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # what it starts itself is started as Python does, not as we did
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without


class Started:
    """What tests use of subprocess.Popen. Standard error goes to the file `errors`, or where the output goes."""

    def __init__(
        self,
        file: Path,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        streams = (writer, None if errors is None else str(errors))
        call = (str(file), list(argv), dict(env), str(cwd or Path.cwd()), *streams)
        self._process = CONTEXT.Process(target=_become, args=call)
        self._process.start()
        writer.close()
        self._reader = reader
        self._printed = bytearray()
        self._open = True
        self.args = [str(file), *argv]
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """(all that it printed, None) once it and its children have ended. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._open:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not multiprocessing.connection.wait([self._reader], left):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            piece = os.read(self._reader.fileno(), 1 << 16)
            self._printed += piece
            if not piece:
                self._open = False
                self._reader.close()
        self.wait(None if end is None else max(end - time.monotonic(), 0.1))
        return self._printed.decode(), None


def run(
    file: Path, argv: Sequence[str | Path], *, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """As subprocess.run of `python FILE ARGV` with both streams captured as text."""
    with tempfile.NamedTemporaryFile("r") as errors:
        process = Started(file, list(map(str, argv)), env, cwd, Path(errors.name))
        try:
            output, _ = process.communicate(TIMEOUT)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors.read())


def run_child(words: Sequence[str], *, stdout: IO[str], env: Mapping[str, str], stderr: int = subprocess.STDOUT) -> int:
    """In place of `reproduce.children.run_child` for the words of `reproduce.commands.command`, one process and one log."""
    assert list(words[:3]) == [sys.executable, "-m", "mt_diffusion"] and stderr == subprocess.STDOUT
    done = run(ROOT / "mt_diffusion" / "__main__.py", words[3:], env=env)
    stdout.write(done.stdout + done.stderr)
    return done.returncode
