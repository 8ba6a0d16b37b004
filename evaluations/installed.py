"""For a file that is run as a script: the project's own folder is found, and packages that are missing are said in one line.

Imported before anything else, so it needs nothing but Python itself.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "PIL", "torch", "tqdm")


def run_as_script(packages: Sequence[str] = PACKAGES) -> None:
    """Import from this clone, whether it is installed or not; ends with exit code 2 where one of `packages` is missing.

    Ctrl-C ends Python at once while it imports, without a traceback; the commands take it over.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The script's own folder stays, as the last: children that are spawned run the script anew.
    sys.path[:] = [str(ROOT), *sys.path[1:], sys.path[0]]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        print(f"error: {what_to_type(missing)}", file=sys.stderr)
        sys.exit(2)


def what_to_type(missing: Sequence[str]) -> str:
    """What to do in this clone where packages are missing."""
    own = ROOT / ".venv" / "bin" / "python"
    there = f"; or run this by {own}, which `make setup` made" if own.exists() else ", or make setup, which makes .venv"
    return f"{', '.join(missing)} not found by {sys.executable}: in {ROOT} type  pip install -e .{there}"
