"""How the command is laid out: its README names every file, and each imports only from those above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vmf_bench

pytestmark = pytest.mark.quick

PACKAGE = Path(str(vmf_bench.__file__)).parent
ORDER = re.findall(r"^\| `([\w/]+)\.py` \|", (PACKAGE / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def imported_from(name: str) -> set[str]:
    """The modules of the package that one of them imports, wherever in it; as paths."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "vmf_bench":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vmf_bench."):
            found.add(node.module.removeprefix("vmf_bench.").replace(".", "/"))
    return found


def test_readme_names_every_file() -> None:
    kept = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    files = {str(path.relative_to(PACKAGE).with_suffix("")) for path in kept}
    assert sorted(ORDER) == sorted(files), f"listed or present alone: {set(ORDER) ^ files}"


def test_every_file_imports_only_from_those_above_it() -> None:
    for place, name in enumerate(ORDER):
        below = imported_from(name) - set(ORDER[:place])
        assert not below, f"{name} imports {sorted(below)}"
