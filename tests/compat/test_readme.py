"""Every example of the drop-ins' README runs as it stands, and each drop-in has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme_blocks import python_blocks

COMPAT = Path(__file__).parents[2] / "vmf_kernels" / "compat"
README = (COMPAT / "README.md").read_text()
BLOCKS = python_blocks(COMPAT / "README.md")
SHARED = ("checkpoints", "tensor_file")
MODULES = sorted(path.stem for path in COMPAT.glob("[!_]*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs_and_prints(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[number], f"compat/README.md block {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip(), f"block {number} printed nothing"
    assert "nan" not in printed, f"block {number} printed {printed!r}"


@pytest.mark.parametrize("module", MODULES)
def test_each_drop_in_has_a_row_a_diff_and_an_example(module: str) -> None:
    assert f"`compat.{module}`" in README, f"the table has no row of compat.{module}"
    assert re.search(rf"```diff\n[^`]*vmf_kernels\.compat\.{module} import", README), f"compat.{module} has no diff"
    used = [block for block in BLOCKS if f"vmf_kernels.compat.{module} import" in block]
    assert used, f"no example imports vmf_kernels.compat.{module}"


@pytest.mark.parametrize("module", MODULES)
def test_diffs_name_what_the_drop_ins_have(module: str) -> None:
    drop_in = __import__(f"vmf_kernels.compat.{module}", fromlist=["x"])
    lines = re.findall(rf"^\+ *from vmf_kernels\.compat\.{module} import (.*)$", README, flags=re.MULTILINE)
    names = [name.split(" as ")[0].strip() for line in lines for name in line.strip("() ").split(",")]
    missing = [name for name in names if name and not hasattr(drop_in, name)]
    assert lines, f"no diff imports vmf_kernels.compat.{module}"
    assert not missing, f"the diff imports {missing}, which compat.{module} lacks"
