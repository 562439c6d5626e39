"""How the trainer is laid out: its README names every file by room, and each imports only from those above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vmf_pretrain
from tests.pretrain.tiny import SUMMARY_KEYS
from tests.test_layout import module_name, order_of

pytestmark = pytest.mark.quick

PACKAGE = Path(str(vmf_pretrain.__file__)).parent
README = (PACKAGE / "README.md").read_text()
ORDER = order_of(README)
SOURCES = {module_name(path, PACKAGE): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = [
    "config",
    "data",
    "storage",
    "networks",
    "methods",
    "evaluation",
    "report",
    "export",
    "engine",
    "recipes",
    "doctor",
]


def imported_from(source: str) -> set[str]:
    """The trainer's modules that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vmf_pretrain":
            below = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{below}.{alias.name}".lstrip(".")
                names.add(inner if inner in SOURCES else below)
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("vmf_pretrain.")}
    return names - {""}


def faults_of(sources: dict[str, str], order: list[str]) -> list[str]:
    """What breaks the order; a sentence each."""
    faults = [f"{name} is not in the tables: add it" for name in sources if name and name not in order]
    for name in sources.keys() & set(order):
        late = [module for module in imported_from(sources[name]) if module not in order[: order.index(name)]]
        faults += [f"{name} imports {module}, which is not above it" for module in late]
    return faults


def test_every_file_is_in_the_tables_and_imports_only_from_those_above_it() -> None:
    packages = {name for name in ORDER if f"{name}.".count(".") == 1 and name in ROOMS}
    assert not [name for name in ORDER if name not in SOURCES], "named but absent"
    sources = {name: source for name, source in SOURCES.items() if name not in packages}
    faults = faults_of(sources, ORDER)
    assert not faults, "\n".join(faults)


def test_rooms_are_in_the_order_of_their_floors() -> None:
    found = list(dict.fromkeys(name.split(".")[0] for name in ORDER if "." in name))
    assert found == ROOMS


def test_import_of_a_file_below_is_found() -> None:
    sources = {"config.a": "from vmf_pretrain.engine.run import Run", "engine.run": ""}
    assert faults_of(sources, ["config.a", "engine.run"]) == ["config.a imports engine.run, which is not above it"]
    assert faults_of({"config.b": ""}, []) == ["config.b is not in the tables: add it"]


def test_no_method_is_known_outside_its_room() -> None:
    """A new method is one new file and one line in a table."""
    outside = {
        name: source
        for name, source in SOURCES.items()
        if name.split(".")[0] in ("engine", "report", "evaluation", "export")
    }
    knowing = [
        name for name, source in outside.items() if re.search(r"methods\.(?!method\b|table\b)\w+|is_(dino|mae)", source)
    ]
    assert not knowing, f"{knowing} know a method"


def test_only_the_rooms_that_need_it_know_that_torchvision_is_mended() -> None:
    knowing = [name for name, source in SOURCES.items() if "with_torchvision" in imported_from(source)]
    assert sorted(knowing) == ["data", "evaluation", "export", "networks"]


def imported_at_once(name: str) -> set[str]:
    """Modules that importing a module of the trainer imports, functions' imports left out."""
    found, todo = set[str](), [SOURCES[name]]
    while todo:
        source = todo.pop()
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        new = imported_from("\n".join(map(ast.unparse, nodes))) - found
        found |= new
        todo += [SOURCES[module] for module in new if module in SOURCES]
    return found


def test_a_run_starts_without_what_only_its_end_needs() -> None:
    """scikit-learn and matplotlib take seconds to import, in every rank."""
    early = {name for name in imported_at_once("engine.run") if name.split(".")[0] in ("sklearn", "matplotlib")}
    assert not early, f"{early} are imported at once"
    for module, needed in (("report.plots", "matplotlib.axes"), ("evaluation.judge", "torch")):  # the control
        assert needed in imported_at_once(module)


def test_readme_explains_every_key_of_the_summary() -> None:
    explained = set(re.findall(r"`(\w+)`", README.split("## summary.json")[1]))
    assert not SUMMARY_KEYS - explained, f"unexplained: {SUMMARY_KEYS - explained}"
