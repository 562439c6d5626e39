"""Every block of the README that can run here does, and names only what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bench.report import PAGES, RESULTS, TABLE, with_tables
from tests.readme_blocks import python_blocks

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = python_blocks(ROOT / "README.md")


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_block_runs_and_prints(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PYTHON_BLOCKS[number], f"README.md block {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip(), f"block {number} printed nothing"
    assert "nan" not in printed, f"block {number} printed {printed!r}"


def test_readme_has_its_blocks() -> None:
    assert len(PYTHON_BLOCKS) == 4, f"found {len(PYTHON_BLOCKS)} python blocks"


def test_set_up_command_uses_the_constraints_and_existing_extras() -> None:
    extras = re.search(r'pip install -c constraints.txt -e "\.\[(.*?)\]"', README)
    assert extras is not None, "the set-up command is gone"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    missing = set(extras[1].split(",")) - set(known)
    assert not missing, f"the README installs extras that do not exist: {missing}"


def test_ci_runs_the_readme_s_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test]"' in script
    tests = re.search(r"## Test\n\n```bash\n(.*)\n```", README)
    assert tests is not None, "the test command is gone"
    assert script.endswith(f"\n{tests[1]}\n"), "CI must end with the README's test command"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_linked_file_exists(path: str) -> None:
    assert (ROOT / path).exists(), f"README links to {path}, which does not exist"


def test_two_line_diff_names_what_the_drop_in_has() -> None:
    import vmf_kernels.compat.dino as drop_in

    imported = re.search(r"\+from vmf_kernels\.compat\.dino import (\w+), (\w+) as StreamingDINOLoss", README)
    assert imported is not None, "the diff is gone"
    missing = [name for name in imported.groups() if not hasattr(drop_in, name)]
    assert not missing, f"the diff imports {missing}, which the drop-in lacks"


def test_tables_are_those_of_the_committed_results() -> None:
    """Numbers of the pages come from ``python -m bench.report --write``, never from a hand; no result is left out."""
    for page in PAGES:
        assert page.read_text() == with_tables(page.read_text()), f"{page.name}: run python -m bench.report --write"
    shown = {found[2] for page in PAGES for found in TABLE.finditer(page.read_text())}
    assert shown == {path.stem for path in RESULTS.glob("*.json")}


def test_a_number_changed_by_hand_is_noticed() -> None:
    """Negative control."""
    found = next(TABLE.finditer(README))
    changed = README.replace(found[0], found[0].replace("1", "2"), 1)
    assert changed != README
    assert with_tables(changed) != changed
    with pytest.raises(FileNotFoundError):
        with_tables("<!-- table nowhere -->\n<!-- /table -->")
