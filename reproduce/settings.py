"""The settings that all of an experiment's folder is made with: what is finished there is taken for the result of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_mt.errors import UserError, reason


def same_settings(out: Path, own: Mapping[str, Any]) -> None:
    """Note the settings in OUT/settings.json. Raises UserError where the folder was begun with others."""
    file = out / "settings.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else own
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read ({reason(error)}); take another --out") from None
    for name, value in own.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{out}: was begun with --{name} {saved[name]}, not {value}; repeat that, or take another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
