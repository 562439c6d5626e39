"""Configurations as YAML files. Reading refuses unknown keys; writing includes every field."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config


def read_config(path: Path, **overrides: Any) -> Config:
    """The configuration in a YAML file, with top-level fields (``seed``, ``method``) overridden where not None.

    Raises:
        PretrainError: the file cannot be read, is not YAML, or has a key, type or value that does not fit.
    """
    try:
        text = path.read_text()
        values = yaml.safe_load(text)
    except OSError as error:
        raise PretrainError(f"config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PretrainError(f"config {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, Mapping):
        raise PretrainError(f"config {path} holds {type(values).__name__}; expected a mapping of sections.")
    _check_keys(values, Config, "")
    chosen = {name: value for name, value in overrides.items() if value is not None}
    return _typed({**values, **chosen}, path)


def write_config(config: Config, path: Path) -> None:
    """Write every field, defaults included, so that the file alone repeats the run."""
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def _typed(values: Mapping[str, Any], path: Path) -> Config:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, "config")
    try:
        config: Config = parser.instantiate(parser.parse_object({"config": dict(values)})).config
    except (ArgumentError, TypeError) as error:
        reason = " ".join(str(error).replace("config.", "").split())
        raise PretrainError(f"config {path}: {reason}.") from None
    return config


def _check_keys(values: Mapping[str, Any], kind: type, section: str) -> None:
    """Refuse a key that is no field of ``kind``, naming the nearest one."""
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {section}{near[0]}?" if near else f"expected one of {', '.join(known)}."
            raise PretrainError(f"{section}{key} is not an option of the configuration; {hint}")
        inner = hints[key]
        if is_dataclass(inner) and isinstance(inner, type):
            if not isinstance(value, Mapping):
                raise PretrainError(f"{section}{key} is {value!r}; expected a section with keys of its own.")
            _check_keys(value, inner, f"{section}{key}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
