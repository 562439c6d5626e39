"""Which settings are paths: ``~`` in them is the home folder, and a run keeps them absolute, to go on from any folder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.start_from import HUB

PATH_FIELDS: frozenset[tuple[str, ...]] = frozenset(
    {("data", "folder"), ("data", "cache"), ("evaluate", "sets"), ("start_from", "weights")}
)
EVALUATION_PATHS: frozenset[tuple[str, ...]] = frozenset(
    {
        ("attention", "masks"),
        ("few_shot", "lists"),
        ("retrieval", "whitening"),
        ("copies", "whitening"),
        ("copies", "distractors"),
        ("video", "predictions"),
    }
)


def expanded(path: str | Path, name: str) -> Path:
    """``path`` with ``~`` and ``~user`` as the home folder.

    Args:
        path: as a person wrote it.
        name: of the setting, for the error.

    Raises:
        PretrainError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PretrainError(f"{name} is {path} but its home folder is not known; write the whole path.") from None


def with_absolute_paths(config: Config) -> Config:
    """A configuration that means the same from any working folder."""
    return with_each_path(config, lambda path: str(Path(path).absolute()))


def with_each_path(config: Config, change: Callable[[str], str]) -> Config:
    """A configuration in which every path is changed; the name of published weights is none."""
    sections: dict[str, Any] = {}
    for name, key in PATH_FIELDS:
        section = sections.get(name, getattr(config, name))
        value = getattr(section, key)
        if isinstance(value, tuple):
            section = replace(section, **{key: tuple(map(change, value))})
        elif value is not None and not (key == "weights" and value.startswith(HUB)):
            section = replace(section, **{key: change(value)})
        sections[name] = section
    return replace(config, **sections)


def with_expanded_paths(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy of nested settings with ``~`` expanded in every path.

    Raises:
        PretrainError: a home folder is not known.
    """
    return {key: _expanded(value, (*above, key)) for key, value in values.items()}


def _expanded(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return with_expanded_paths(value, path)
    if path not in PATH_FIELDS | EVALUATION_PATHS:
        return value
    if isinstance(value, list | tuple):
        return type(value)(_expanded(item, path) for item in value)
    return str(expanded(value, ".".join(path))) if isinstance(value, str) and value.startswith("~") else value
