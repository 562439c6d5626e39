"""Plain values as the types that dataclasses declare; a value that does not fit is named, with what was expected."""

import difflib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vmf_pretrain.config.errors import PretrainError

LONGEST_SHOWN = 60  # characters of a value in an error


class UnfitValueError(PretrainError):
    """A value that does not fit its field.

    Attributes:
        path: keys from the top to the field.
    """

    def __init__(self, path: Sequence[str], message: str) -> None:
        super().__init__(message)
        self.path = tuple(path)


def fitted(kind: Any, value: Any, path: tuple[str, ...] = ()) -> Any:
    """``value`` with every leaf as ``kind`` declares it; sections stay mappings, so that layers of settings can be merged.

    ``kind`` is a dataclass, int, float, bool, str, Any, Literal, ``X | None``, tuple, list or dict. A float takes a whole
    number; nothing else is converted, and no number may be infinite or NaN. A dataclass takes a mapping of some of its fields.

    Raises:
        UnfitValueError: a key is unknown, or a value has another type than its field.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise UnfitValueError(path, f"{'.'.join(path)} is {shown(value)}; expected a section with keys of its own.")
        for key in value:
            _known(kind, key, path)
        hints = get_type_hints(kind)
        return {key: fitted(hints[key], item, (*path, key)) for key, item in value.items()}
    found = _converted(kind, value)
    if found is _UNFIT:
        raise UnfitValueError(path, f"{'.'.join(path)} is {shown(value)}; expected {expected(kind)}.")
    return found


def made(kind: Any, values: Any) -> Any:
    """The dataclass of fitted values.

    Raises:
        PretrainError: what the dataclass raises when it is made.
    """
    if not (is_dataclass(kind) and isinstance(kind, type)):
        return values
    hints = get_type_hints(kind)
    return kind(**{key: made(hints[key], item) for key, item in values.items()})


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings in one; a later layer wins, key by key."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = result.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                value = merged(before, value)
            result[key] = value
    return result


def hint_of(kind: type, path: Sequence[str]) -> Any:
    """The declared type of the field at ``path``; ``Any`` below a dict.

    Raises:
        UnfitValueError: there is no such field.
    """
    hint: Any = kind
    for place, key in enumerate(path):
        if get_origin(hint) is dict:
            return Any
        if not is_dataclass(hint) or not isinstance(hint, type):
            above = ".".join(path[:place])
            raise UnfitValueError(path, f"{above} is no section; it has no option {'.'.join(path)}.")
        _known(hint, key, tuple(path[:place]))
        hint = get_type_hints(hint)[key]
    return hint


def names_of(kind: type, above: str = "") -> list[str]:
    """Dotted names of all fields of a dataclass and of those within it."""
    names: list[str] = []
    hints = get_type_hints(kind)
    for key in (field.name for field in fields(kind)):
        hint = hints[key]
        inner = is_dataclass(hint) and isinstance(hint, type)
        names += names_of(hint, f"{above}{key}.") if inner else [f"{above}{key}"]
    return names


def takes_text(hint: Any) -> bool:
    """Whether a field's values are words, so that a word on the command line is one whatever YAML would make of it."""
    members = _members(hint)
    texts = [item is str or (get_origin(item) is Literal and isinstance(get_args(item)[0], str)) for item in members]
    return any(texts) and all(text or item is type(None) for text, item in zip(texts, members, strict=True))


def expected(kind: Any) -> str:
    """What fits a type, in words."""
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in get_args(kind))
    members = _members(kind)
    if len(members) > 1:
        return " or ".join(dict.fromkeys(expected(item) for item in members))
    if get_origin(kind) in (tuple, list):
        inner = get_args(kind)
        if get_origin(kind) is list or inner[-1] is Ellipsis:
            return f"a list, each item {expected(inner[0])}"
        return f"a list of {len(inner)}, each {' or '.join(dict.fromkeys(expected(item) for item in inner))}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
    if kind is Any or kind is dict or get_origin(kind) is dict:
        return "plain values: text, finite numbers, true, false, null, lists and mappings of them"
    return words.get(kind, "a section with keys of its own")


def shown(value: Any) -> str:
    """A value as YAML would show it, cut where it is long."""
    words = isinstance(value, str | bool | type(None))
    text = json.dumps(value, ensure_ascii=False) if words else " ".join(str(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


_UNFIT = object()


def _known(kind: type, key: Any, path: tuple[str, ...]) -> None:
    """Refuse a key that is no field of ``kind``, naming the nearest one."""
    known = [field.name for field in fields(kind)]
    if key in known:
        return
    name = " ".join(".".join((*path, str(key))).split())
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {'.'.join((*path, near[0]))}?" if near else f"expected one of {', '.join(known)}."
    raise UnfitValueError((*path, str(key)), f"{name} is not an option of the configuration; {hint}")


def _converted(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``, or _UNFIT."""
    if kind is Any:
        return value if _is_plain(value) else _UNFIT
    members = _members(kind)
    if len(members) > 1:
        results = (_converted(item, value) for item in members)
        return next((result for result in results if result is not _UNFIT), _UNFIT)
    if get_origin(kind) is Literal:
        same = [choice for choice in get_args(kind) if type(choice) is type(value) and choice == value]
        return same[0] if same else _UNFIT
    if get_origin(kind) in (tuple, list):
        return _listed(kind, value)
    if get_origin(kind) is dict or kind is dict:
        return dict(value) if isinstance(value, Mapping) and _is_plain(value) else _UNFIT
    return _scalar(kind, value)


def _is_plain(value: Any) -> bool:
    """Whether YAML can hold a value, and reads the same back."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return type(value) in (str, int, bool, type(None)) or (type(value) is float and math.isfinite(value))


def _scalar(kind: Any, value: Any) -> Any:
    if kind is type(None):
        return None if value is None else _UNFIT
    if kind is str and isinstance(value, Path):  # from Python
        return str(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return _UNFIT
        return number if math.isfinite(number) else _UNFIT
    return value if type(value) is kind else _UNFIT


def _listed(kind: Any, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _UNFIT
    inner = get_args(kind)
    if get_origin(kind) is list or inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        return _UNFIT
    items = [_converted(hint, item) for hint, item in zip(inner, value, strict=True)]
    if any(item is _UNFIT for item in items):
        return _UNFIT
    return items if get_origin(kind) is list else tuple(items)


def _members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
