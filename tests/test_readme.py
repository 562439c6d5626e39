"""Every block of the README that can run here does, and names only what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bench.report import PAGES, PICTURE, RESULTS, TABLE, head_picture, with_tables
from tests.readme_blocks import python_blocks

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WITH_PYTHON = ("README.md", "docs/losses.md")
PYTHON_BLOCKS = [
    (page, number, source) for page in WITH_PYTHON for number, source in enumerate(python_blocks(ROOT / page))
]
LINKING = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")), "CONTRIBUTING.md")
LINKS = [
    (page, link)
    for page in LINKING
    for link in sorted(set(re.findall(r"\]\(((?!http|#)[^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())))
]


@pytest.mark.parametrize(("page", "number", "source"), PYTHON_BLOCKS, ids=[f"{p} {n}" for p, n, _ in PYTHON_BLOCKS])
def test_python_block_runs_and_prints(page: str, number: int, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, f"{page} block {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip(), f"block {number} of {page} printed nothing"
    assert "nan" not in printed, f"block {number} of {page} printed {printed!r}"


def test_pages_have_their_blocks() -> None:
    assert [page for page, _, _ in PYTHON_BLOCKS] == ["README.md"] * 3 + ["docs/losses.md"]


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


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page} {link}" for page, link in LINKS])
def test_linked_file_exists(page: str, link: str) -> None:
    assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}, which does not exist"


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
    assert PICTURE.read_text() == head_picture(), f"{PICTURE.name}: run python -m bench.report --write"
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
