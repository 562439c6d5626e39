"""How the trainer is laid out: its README names every file, and each imports only from those above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vmf_pretrain
from tests.pretrain.tiny import SUMMARY_KEYS

pytestmark = pytest.mark.quick

PACKAGE = Path(str(vmf_pretrain.__file__)).parent
README = (PACKAGE / "README.md").read_text()
TABLE = README.split("## Why")[0]
ORDER = re.findall(r"^\| `(\w+)\.py` \|", TABLE, flags=re.MULTILINE)


def imported_from(name: str) -> set[str]:
    """The trainer's modules that a module imports, wherever in it."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {module.split(".")[1] for module in names if module.startswith("vmf_pretrain.")}


def test_readme_names_every_file() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(files), f"listed or present alone: {set(ORDER) ^ files}"


@pytest.mark.parametrize("place", range(len(ORDER)), ids=ORDER)
def test_module_imports_only_from_those_above_it(place: int) -> None:
    below = imported_from(ORDER[place]) - set(ORDER[:place])
    assert not below, f"{ORDER[place]} imports {sorted(below)}"


def test_only_the_package_itself_knows_that_torchvision_is_mended() -> None:
    knowing = [name for name in ORDER if "torchvision_import" in imported_from(name)]
    assert not knowing, f"{knowing} import it too"
    assert "torchvision_import" in imported_from("__init__")


def test_readme_explains_every_key_of_the_summary() -> None:
    explained = set(re.findall(r"`(\w+)`", README.split("## summary.json")[1]))
    assert not SUMMARY_KEYS - explained, f"unexplained: {SUMMARY_KEYS - explained}"
