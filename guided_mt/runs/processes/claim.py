"""Who writes into a place: one run at a time in a run's folder, one sampler for an output file.

A lock of the operating system on a small file, held by the main process. It is gone when that process is, however it ended, and
processes that it started never have it (POSIX record locks belong to one process alone; where a network file system has locks,
they hold between machines too).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from ...errors import UserError

try:
    import fcntl
except ImportError:  # a system without them
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
log = logging.getLogger("guided_mt")
_own: set[Path] = (
    set()
)  # locks of this process: the system would grant them again, and drop them when a second handle is closed


class Claim:
    """The sole right to write to `place`, a folder or a file: a context manager. It makes the folder where there is none.

    place: what the message names. file: where the lock is, by default .lock inside the folder. setting: how the user names the
    place, as --log_dir. Entering raises UserError where another process has it, or the folder can't be written; where a file
    system has no locks it says so, and all goes on.
    """

    def __init__(self, place: Path, *, file: Path | None = None, setting: str = "--log_dir"):
        self.place, self.setting = place, setting
        self.file = (file or place / FILE).absolute()
        self.handle, self.holder = -1, 0  # the open file, and the process that opened it
        self.made: list[Path] = []  # folders that were not there before, the deepest first

    @classmethod
    def of_file(cls, out: Path, setting: str = "--out") -> Claim:
        """Of an output file: the lock lies beside it."""
        return cls(out, file=out.parent / f".{out.name}.lock", setting=setting)

    def __enter__(self) -> Claim:
        folder = self.file.parent
        if self.file in _own:
            raise UserError(self._refusal("this process"))
        try:
            self.made = [path for path in (folder, *folder.parents) if not path.exists()]
            while self.handle < 0:
                folder.mkdir(parents=True, exist_ok=True)
                self._try()
        except OSError as error:
            raise UserError(
                f"{self.setting} {self.place}: can't be written ({error.strerror}); name another folder"
            ) from None
        _own.add(self.file)
        self.holder = os.getpid()
        return self

    def _try(self) -> None:
        """Open and lock the file; leaves the handle negative where its last holder has just removed it."""
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not self._lock(handle):
                raise UserError(self._refusal(os.pread(handle, 1000, 0).decode(errors="replace").partition("\n")[0]))
            if not _is_file_of(self.file, handle):
                os.close(handle)
                return
            text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            os.ftruncate(handle, 0)
            os.write(handle, f"{text}\n{shlex.join(sys.argv)}\n".encode())
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        self.handle = handle

    def _lock(self, handle: int) -> bool:
        """False where another process holds the lock."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            log.warning(
                "%s: this file system has no locks (%s), so nothing stops a second run from writing here: don't start one",
                self.place,
                error.strerror,
            )
        return True

    def _refusal(self, holder: str) -> str:
        return (
            f"{self.setting} {self.place}: {holder or 'another process'} is writing here; wait until it ends, stop it, or name "
            f"another place (the lock is {self.file})"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back, and leave no folder behind that this made and nobody filled. A forked child has nothing to give."""
        if os.getpid() != self.holder:
            return
        _own.discard(self.file)
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
        os.close(self.handle)
        self.handle = -1
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def _is_file_of(path: Path, handle: int) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        there, here = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
