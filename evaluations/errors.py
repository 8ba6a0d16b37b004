"""The one error for bad input, and how every command here reports it."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence


class EvaluationError(ValueError):
    """Bad input: one line that names the file, key or value and the way out. Commands print it and exit with code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the valid name that looks most like `name`; '' where none does."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def warn(message: str) -> None:
    """One line on stderr for what does not stop the evaluation."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main` as a program: EvaluationError, or the system's refusal of a file, is one line and exit code 2; Ctrl-C 130.

    So is a package that is not installed.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Python's again, see `installed`
    try:
        main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (EvaluationError, OSError, MemoryError) as error:
        print(f"error: {_in_a_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "evaluations").startswith("evaluations"):  # a fault of ours
            raise
        print(f"error: the package {error.name} is missing: pip install -e '.[eval]'", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _in_a_line(error: Exception) -> str:
    """The text, or what the system says of a file, which is named first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"memory has run out{f' ({error})' if str(error) else ''}; take a smaller --batch_size, or fewer images"
    return str(error)
