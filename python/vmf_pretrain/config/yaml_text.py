"""YAML 1.2 as values: what a settings file may hold, read without running anything and in bounded memory.

PyYAML reads YAML 1.1, where ``on`` is true, ``012`` is 10 and ``1e-4`` is text. Here its scanner and parser are used, and the
core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2) says what a plain scalar is. Anchors, merge keys and tags are
refused: no setting needs them, and they are how a small file becomes a large or a dangerous one.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vmf_pretrain.config.errors import PretrainError

LARGEST_FILE = 1 << 20  # bytes; every field written out is 3 KiB
DEEPEST = 20  # levels; settings have three
LONGEST_NUMBER = 40  # characters

Lines = dict[tuple[str, ...], int]  # line of each key, counted from 1

_CORE: list[tuple[re.Pattern[str], Callable[[str], Any]]] = [
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
]


class UnfitYamlError(Exception):
    """Why a text is not read, and the line, counted from 1, or None."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def read_text(path: Path) -> str:
    """A small file as UTF-8, with or without a byte order mark, whatever the locale.

    Raises:
        PretrainError: it cannot be read, is larger than 1 MiB, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise PretrainError(f"config {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(content) > LARGEST_FILE:
        raise PretrainError(f"config {path} is larger than 1 MiB; expected a file of settings.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PretrainError(f"config {path} is not YAML: byte {error.start} is not UTF-8 text.") from None


def yaml_values(text: str) -> tuple[Any, Lines]:
    """The values of one document, and the line of each key by its path.

    Raises:
        UnfitYamlError: it is not YAML, or holds what settings must not: a key twice, an alias, a tag.
    """
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise UnfitYamlError(_one_line(error.problem or error.context), line) from None
    except yaml.reader.ReaderError as error:
        raise UnfitYamlError(f"it holds the character {error.character!r}, which no YAML holds") from None
    lines: Lines = {}
    return (None if root is None else _value(root, (), lines)), lines


def plain_scalar(text: str) -> Any:
    """What a plain scalar stands for in the core schema: None, a bool, an int, a float, or the text itself."""
    for pattern, make in _CORE:
        if pattern.fullmatch(text):
            if len(text) > LONGEST_NUMBER:  # int() takes quadratic time
                raise UnfitYamlError(f"a number has {len(text)} characters; expected at most {LONGEST_NUMBER}")
            return make(text)
    return text


class _Loader(yaml.SafeLoader):
    """Nodes of a document, bounded in depth, without anchors and aliases."""

    deep = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UnfitYamlError(f"anchors and aliases ({event.anchor}) are not read; write the values out", line)
        if getattr(event, "tag", None) is not None and event.tag != "!":
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise UnfitYamlError(f"the tag {tag} is not read; settings are plain values", line)
        self.deep += 1
        if self.deep > DEEPEST:
            raise UnfitYamlError(f"it is nested more than {DEEPEST} levels deep", line)
        node = super().compose_node(parent, index)
        self.deep -= 1
        return node


def _value(node: yaml.Node, path: tuple[str, ...], lines: Lines) -> Any:
    if isinstance(node, yaml.ScalarNode):
        try:
            return node.value if node.style in ("'", '"', "|", ">") else plain_scalar(node.value)
        except UnfitYamlError as error:
            raise UnfitYamlError(str(error), node.start_mark.line + 1) from None
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, str(place)), lines) for place, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise UnfitYamlError("a key is a list or a mapping; expected a word", line)
        inner = (*path, _one_line(key))
        if key == "<<":
            raise UnfitYamlError("merge keys (<<) are not read; write the values out", line)
        if key in values:
            raise UnfitYamlError(f"{'.'.join(inner)} is given twice, first in line {lines[inner]}", line)
        lines[inner] = line
        values[key] = _value(value_node, inner, lines)
    return values


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
