"""Settings from a file, from the command line and from Python, in layers: each is checked by itself, then they are merged."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.former import renewed
from vmf_pretrain.config.layers import layered
from vmf_pretrain.config.method import require_method
from vmf_pretrain.config.paths import with_expanded_paths
from vmf_pretrain.config.recipe import RecipeHeader
from vmf_pretrain.config.run import Config, require_seed
from vmf_pretrain.config.typed import UnfitValueError, fitted, hint_of, made, merged, shown, takes_text
from vmf_pretrain.config.yaml_text import UnfitYamlError, plain_scalar, read_text, yaml_values

HEADER = "recipe"  # the section that describes a recipe
EXTENDS = "extends"  # the key with the name of the recipe whose settings lie below those of a file


@dataclass(frozen=True)
class _File:
    """What a file of settings holds: its own settings, a recipe's description, and the recipe that it extends."""

    settings: dict[str, Any]
    header: RecipeHeader | None
    extends: str | None


def read_config(path: Path, **overrides: Any) -> Config:
    """The configuration in a YAML file, with fields (``seed=3``, ``**{"train.epochs": 3}``) overridden where not None.

    Raises:
        PretrainError: the file cannot be read, is not YAML, or has a key, type or value that does not fit.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    return config_of(read_layer(path), python_layer(given))


def config_of(*layers: Mapping[str, Any]) -> Config:
    """The configuration of layers of settings, later ones over earlier ones.

    Raises:
        PretrainError: a value is out of range, or two do not go together.
    """
    config: Config = made(Config, layered(*layers))
    return config


def read_layer(path: Path, recipe: Callable[[str], Path] | None = None) -> dict[str, Any]:
    """The settings of a file over those of the recipe that it extends, without a recipe's description.

    Args:
        path: of the file.
        recipe: where a recipe of a name is; None where a file has to be complete.

    Raises:
        PretrainError: it cannot be read or is not YAML; a key is unknown or a value of the wrong type: names file and line.
    """
    found = _read(path)
    if found.extends is None:
        return found.settings
    if recipe is None:
        raise PretrainError(f"config {path} extends {found.extends} but has to say every setting itself; leave it out.")
    return layered(read_layer(recipe(found.extends), recipe), found.settings)


def read_parent(path: Path) -> str | None:
    """The name of the recipe that a file extends, or None.

    Raises:
        PretrainError: as ``read_layer``.
    """
    return _read(path).extends


def read_header(path: Path) -> RecipeHeader:
    """What a recipe says of itself.

    Raises:
        PretrainError: as ``read_layer``, or it says nothing.
    """
    header = _read(path).header
    if header is None:
        raise PretrainError(f"config {path} has no section {HEADER}; expected {_header_keys()}.")
    return header


def text_layer(texts: Mapping[str, str], kind: type = Config) -> dict[str, Any]:
    """Settings of the command line: dotted names to text. A word stays one where a field takes words; else it is YAML.

    Args:
        texts: by the dotted names of the fields of ``kind``.
        kind: the dataclass of all settings.

    Raises:
        PretrainError: a name is unknown, or a text is not YAML or of the wrong type.
    """
    return merged(*(_one_text(name, text, kind) for name, text in texts.items()))


def options_layer(short: Mapping[str, str | None], fields: Mapping[str, str], kind: type = Config) -> dict[str, Any]:
    """Settings of the command line, some of which have a short option too, such as ``--data`` for ``data.folder``.

    Args:
        short: what the short options say, by the dotted names that they stand for; None where an option is not given.
        fields: what stands behind ``--section.field``.
        kind: the dataclass of all settings.

    Raises:
        PretrainError: as ``text_layer``, or a setting is given in both ways.
    """
    texts = {name: text for name, text in short.items() if text is not None}
    twice = [name for name in texts if name in fields]
    if twice:
        raise PretrainError(f"{twice[0]} is given twice, as --{twice[0]} and by its short name; expected one of them.")
    return text_layer({**texts, **fields}, kind)


def python_layer(values: Mapping[str, Any], kind: type = Config) -> dict[str, Any]:
    """Settings of a call: sections as mappings, or dotted names of the fields of ``kind``.

    Raises:
        PretrainError: a name is unknown, or a value has the wrong type.
    """
    nested = merged(*(_nested(name.split("."), value) for name, value in values.items()))
    return with_expanded_paths(_fitted(nested, kind))


def check_sections(layer: Mapping[str, Any]) -> None:
    """Each section of a layer, made by itself: its values are in range, whatever the other sections will be.

    Raises:
        PretrainError: a value is out of range, or the method unknown.
    """
    if "method" in layer:
        require_method(layer["method"])
    if "seed" in layer:
        require_seed(layer["seed"])
    for name, values in layer.items():
        made(hint_of(Config, [name]), values)


def config_text(config: Any, encoding: str = "utf-8") -> str:
    """Every field of a dataclass of settings as YAML, defaults included; letters are escaped where ``encoding`` lacks one."""
    return settings_text(asdict(config), encoding)


def settings_text(settings: Mapping[str, Any], encoding: str = "utf-8") -> str:
    """The same of nested settings."""
    values = _plain(settings)
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


def text_config(text: str) -> Config:
    """The configuration that ``config_text`` wrote."""
    return config_of(fitted(Config, yaml_values(text)[0]))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the core schema would read as something else."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is not yaml.ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        names = {type(None): "null", bool: "bool", int: "int", float: "float"}
        return f"tag:yaml.org,2002:{names.get(type(plain_scalar(value)), 'str')}"

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read(path: Path) -> _File:
    text = read_text(path)
    try:
        values, lines = yaml_values(text)
    except UnfitYamlError as error:
        raise PretrainError(f"config {path} is not YAML as settings need it{_line(error.line)}: {error}.") from None
    if not isinstance(values, Mapping):
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise PretrainError(f"config {path} holds {kind}; expected a mapping of sections.")
    try:
        header, extends = _header(values), values.get(EXTENDS)
        if not isinstance(extends, str | None):
            raise UnfitValueError((EXTENDS,), f"{EXTENDS} is {shown(extends)}; expected the name of a recipe.")
        settings = {key: value for key, value in values.items() if key not in (HEADER, EXTENDS)}
        return _File(with_expanded_paths(fitted(Config, renewed(settings))), header, extends)
    except UnfitValueError as error:
        raise PretrainError(f"config {path}{_line(lines.get(error.path))}: {error}") from None


def _header(values: Mapping[str, Any]) -> RecipeHeader | None:
    if HEADER not in values:
        return None
    header = fitted(RecipeHeader, values[HEADER], (HEADER,))
    missing = [field.name for field in fields(RecipeHeader) if field.name not in header]
    if missing:
        raise UnfitValueError((HEADER,), f"{HEADER} has no {', '.join(missing)}; expected {_header_keys()}.")
    return RecipeHeader(**header)


def _header_keys() -> str:
    return ", ".join(field.name for field in fields(RecipeHeader))


def _one_text(name: str, text: str, kind: type) -> dict[str, Any]:
    path = name.split(".")
    try:
        hint = hint_of(kind, path)
        if takes_text(hint):
            value: Any = None if text == "null" and _fits_null(hint) else text
        else:
            value = yaml_values(text)[0]
        return with_expanded_paths(_fitted(_nested(path, value), kind))
    except UnfitYamlError as error:
        raise PretrainError(f"--{name} is {shown(text)}, which is not YAML: {error}.") from None
    except UnfitValueError as error:
        raise PretrainError(f"--{error}") from None


def _fitted(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Values as the fields of ``kind``; only runs have settings of earlier versions."""
    fitting: dict[str, Any] = fitted(kind, renewed(values) if kind is Config else values)
    return fitting


def _fits_null(hint: Any) -> bool:
    """Whether a field may be null."""
    try:
        return fitted(hint, None, ("",)) is None
    except UnfitValueError:
        return False


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    result: dict[str, Any] = value
    return result


def _line(line: int | None) -> str:
    return "" if line is None else f" line {line}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
