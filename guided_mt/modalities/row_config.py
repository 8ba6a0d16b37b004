"""What one modality is built from: its own options, those of the run, and the diffusion space."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ..errors import UserError, nearest
from ..runs.config import Config
from .space import Space


class RowConfig:
    """The configuration as one modality sees it: what is its own, then what the run says; all by attribute.

    own: {option: value} of this modality alone, as a YAML file gives them; where there is none, an option that names files may be
    one for all, or NAME=FILE,NAME=FILE.
    """

    def __init__(self, config: Config, name: str, file_options: Collection[str], space: Space):
        self.config, self.name, self.file_options, self.space = config, name, file_options, space
        self.own: dict[str, Any] = config.own.get(name, {})

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        if key in self.own:
            return self.own[key]
        value = getattr(self.config, key)
        if key in self.file_options and "=" in value:
            return per_modality(self.config, key, str, default="").get(self.name, "")
        return value

    def __getitem__(self, section: type) -> Any:
        """The run's section of this class."""
        return self.config[section]

    def fill_in(self, key: str, value: Any) -> None:
        """Set an option that was left open."""
        if key in self.own or self.config.own:
            self.own[key] = value
            self.config.own[self.name] = self.own
            return
        setattr(next(s for s in self.config.sections() if key in s.__dataclass_fields__), key, value)

    def flag(self, key: str) -> str:
        """An option as the user wrote it, for messages."""
        return f"model.params.mt_tasks.{self.name}.{key}" if self.config.own else f"--{key}"


def split_names(mt_task: str) -> dict[str, str]:
    """{modality: row of TASKS, known or not} of `--mt_task`; {} for 'none'. A word is ROW, or NAME:ROW."""
    words = [word.strip().partition(":") for word in mt_task.split(",") if word.strip() not in ("", "none")]
    return {name: row if colon else name for name, colon, row in words}


def per_modality(
    config: Config, flag: str, convert: Callable[[str], Any], default: str, of: Collection[str] | None = None
) -> dict[str, Any]:
    """{modality: value} of a flag that is one value for all, or NAME=VALUE,NAME=VALUE with `default` for the others. of: the
    modalities that the flag is about; None: all.

    Raises UserError for a name that is none of these, and where `convert` raises one.
    """
    names, text = [name for name in split_names(config.mt_task) if of is None or name in of], getattr(config, flag)
    if "=" not in text:
        value = convert(text)
        return dict.fromkeys(names, value)
    values = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in names or name in values:
            wrong = (
                "twice" if name in values else f"but --mt_task {config.mt_task} has no '{name}'{nearest(name, names)}"
            )
            raise UserError(
                f"--{flag} {text}: names {name or part} {wrong}; "
                f"write {','.join(f'{n}=VALUE' for n in names) or 'one value'}"
            )
        values[name] = convert(value)
    other = convert(default)
    return {name: values.get(name, other) for name in names}
