"""The public names, settings and command lines change only with a commit that says so."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from pathlib import Path
from typing import ForwardRef

import pytest

import vmf_kernels
import vmf_pretrain
from tests.surface import FROZEN, command_line, surface

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]


def changes(before: str, after: str) -> list[str]:
    """Lines that went (-) or came (+)."""
    found = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in found if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def test_the_surface_is_what_was_promised() -> None:
    found = changes(FROZEN.read_text(), surface())
    assert not found, (
        "users would see this change. If it is meant, run python -m tests.surface --write and say it in CHANGELOG.md; "
        "what goes is first deprecated (CONTRIBUTING.md):\n" + "\n".join(found)
    )


def test_a_change_is_noticed() -> None:
    """Negative control: an argument, a setting's default and an option, each changed by one word."""
    text = surface()
    for old, new in (
        ("nlayers=3", "layers=3"),
        ("optim.clip: float = 3.0", "optim.clip: float = 1.0"),
        ("vmf-pretrain fit --recipe", "vmf-pretrain fit --settings"),
    ):
        assert old in text, f"{old} is gone; choose another line for the control"
        assert changes(text, text.replace(old, new)), old
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--several", nargs=2, choices=("a", "b"), default="a")
    assert command_line(parser) == ["x --several (2) of a, b = a"]


def test_the_version_is_said_once() -> None:
    """The package, the changelog and the citation agree, and nothing else states a version of ours."""
    version = vmf_kernels.__version__
    assert vmf_pretrain.__version__ == version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vmf_kernels.__version__"}
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(), "CHANGELOG.md has no heading for this version"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_types_of_public_tuples_are_types_and_not_names() -> None:
    """The API pages link them, and pdoc warns of a name that it cannot resolve."""
    public = (getattr(vmf_kernels, name) for name in vmf_kernels.__all__)
    tuples = [found for found in public if isinstance(found, type) and issubclass(found, tuple)]
    types = [kind for found in tuples for kind in found.__new__.__annotations__.values()]
    assert len(types) > 1
    assert not [kind for kind in types if isinstance(kind, str | ForwardRef)]
