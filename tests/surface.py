"""What users may rely on, as lines of text: public names with their signatures, settings with their defaults, command lines.

python -m tests.surface --write    # after a change of the surface that is meant; CHANGELOG.md then says what changed
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import vmf_bench.cli
import vmf_kernels
import vmf_pretrain
import vmf_pretrain.cli
from vmf_pretrain.config.run import Config

FROZEN = Path(__file__).with_name("surface.txt")
COMPAT = Path(vmf_kernels.__file__).with_name("compat")
METHODS_OF_USERS = ("forward", "materialize", "prototypes", "update_center")  # beside a class's own signature
COUNTS: dict[int | str | None, str] = {None: "", 0: " (no value)"}  # argparse's nargs, as they are said


def surface() -> str:
    """The whole surface, one thing a line, sorted within each part."""
    parts = {
        "vmf_kernels": names_of_module("vmf_kernels"),
        **{
            name: names_of_module(name)
            for name in sorted(f"vmf_kernels.compat.{path.stem}" for path in COMPAT.glob("[a-z]*.py"))
            if hasattr(importlib.import_module(name), "__all__")
        },
        "vmf_pretrain": names_of_module("vmf_pretrain"),
        "settings of vmf-pretrain": settings_of(Config),
        "command line of vmf-pretrain": command_line(vmf_pretrain.cli._parser()),
        "command line of vmf-bench": command_line(vmf_bench.cli._parser()),
    }
    return "\n".join(f"[{title}]\n" + "\n".join(lines) + "\n" for title, lines in parts.items())


def names_of_module(name: str) -> list[str]:
    """A line for each public name, and one for each method that users call."""
    module = importlib.import_module(name)
    lines = []
    for public in sorted(module.__all__):
        found = getattr(module, public)
        lines.append(public + signature(found))
        methods = [
            m for m in METHODS_OF_USERS if inspect.isclass(found) and inspect.isfunction(getattr(found, m, None))
        ]
        lines += [f"{public}.{method}{signature(getattr(found, method))}" for method in methods]
    return lines


def signature(found: Any) -> str:
    """Names, kinds and defaults of the arguments; annotations may change without breaking a call."""
    try:
        taken = inspect.signature(found)
    except ValueError:  # a builtin
        return ""
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in taken.parameters.values()]
    return str(taken.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def settings_of(kind: type, above: str = "") -> list[str]:
    """A line for each setting: dotted name, type, default."""
    hints = get_type_hints(kind)
    lines = []
    for one in dataclasses.fields(kind):
        hint, name = hints[one.name], above + one.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            lines += settings_of(hint, f"{name}.")
        else:
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            spelled = getattr(hint, "__name__", "") if isinstance(hint, type) and not hasattr(hint, "__args__") else ""
            shown = "required" if default is dataclasses.MISSING else repr(default)
            lines.append(f"{name}: {spelled or str(hint).replace('typing.', '')} = {shown}")
    return lines


def command_line(parser: argparse.ArgumentParser) -> list[str]:
    """A line for each argument of each sub-command."""
    return list(_arguments(parser))


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in sorted(action.choices):
                yield from _arguments(action.choices[name])
        elif not isinstance(action, argparse._HelpAction):
            spelled = "|".join(action.option_strings) or (str(action.metavar or action.dest))
            many = COUNTS.get(action.nargs, f" ({action.nargs})")
            choices = "" if action.choices is None else f" of {', '.join(map(str, action.choices))}"
            default = "" if action.default in (None, argparse.SUPPRESS, False) else f" = {action.default}"
            yield f"{parser.prog} {spelled}{many}{choices}{default}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.surface --write")
    FROZEN.write_text(surface())
    print(f"{FROZEN} is written; say in CHANGELOG.md what changed")
