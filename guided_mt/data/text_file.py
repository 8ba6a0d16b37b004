"""A text file of one entry in each line: prompts, and classes as texts."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, reason


def read_lines(file: str, where: str, way_out: str = "") -> list[str]:
    """The lines of a file in UTF-8 without blanks around them, and without empty ones. A mark of the encoding before the first is
    none of it, and only line feeds end a line (with a carriage return before it or not).

    where: the flag and its value, for messages; way_out: what else to write, after a semicolon. Raises UserError.
    """
    try:
        text = Path(file).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is no text in UTF-8 ({error.reason}, byte {error.start + 1}); save it as such"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: can't be read ({reason(error)}){way_out and f'; {way_out}'}") from None
    return [line.strip() for line in text.split("\n") if line.strip()]
