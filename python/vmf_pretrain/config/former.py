"""Settings as earlier versions wrote them, so that the config.yaml of an old run still loads."""

from collections.abc import Mapping
from typing import Any

FORMER_VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("train", "precision"): {"32-true": "fp32", "bf16-mixed": "bf16"},
}


def renewed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with values under their present names; all else unchanged."""
    return {key: _renewed(value, (key,)) for key, value in values.items()}


def _renewed(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renewed(item, (*path, key)) for key, item in value.items()}
    return FORMER_VALUES.get(path, {}).get(value, value) if isinstance(value, str) else value
