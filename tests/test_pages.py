"""Commands of docs/measure.md, CONTRIBUTING.md and the workflow name what exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import vmf_bench.cli

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bash_lines(page: str) -> list[str]:
    """Lines of the page's blocks of bash, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]


def fault_of(line: str) -> str | None:
    """What of a command does not exist; None if all does."""
    words = shlex.split(line)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    match words:
        case ["vmf-bench", *options]:
            try:
                vmf_bench.cli._parser().parse_args(options)
            except SystemExit:
                return f"{line}: vmf-bench has no such option"
        case ["python", "-m", module, *_] if module.split(".")[0] in ("bench", "tests", "vmf_pretrain"):
            if importlib.util.find_spec(module) is None:
                return f"{line}: there is no module {module}"
        case ["pytest", *options]:
            missing = [word for word in options if "/" in word and not (ROOT / word.split("::")[0]).exists()]
            return f"{line}: {missing[0]} does not exist" if missing else None
        case ["bash", path, *_]:
            return None if (ROOT / path).is_file() else f"{line}: {path} does not exist"
        case ["pip", "install", *options]:
            extras = {extra for found in re.findall(r"\[([\w,]+)\]", line) for extra in found.split(",")}
            unknown = extras - set(PROJECT["optional-dependencies"])
            return f"{line}: no extra {sorted(unknown)}" if unknown else None
    return None


COMMANDS = [
    *(line for page in ("docs/measure.md", "CONTRIBUTING.md") for line in bash_lines(page) if line),
    *(step["run"] for step in STEPS if "run" in step),
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_names_what_exists(line: str) -> None:
    fault = fault_of(line)
    assert fault is None, fault


@pytest.mark.parametrize(
    "line",
    [
        "vmf-bench --rowss 3",
        "python -m bench.nothing",
        "pytest tests/test_nothing.py",
        "bash bench/run.sh",
        "A=1 pip install -e '.[nothing]'",
    ],
)
def test_a_command_of_nothing_is_found(line: str) -> None:
    """Negative control."""
    assert fault_of(line) is not None


def test_the_workflow_runs_what_lands_and_the_supported_versions() -> None:
    """The full job is .ci/run, and the matrix begins at the oldest Python that the package takes."""
    assert {"run": "bash .ci/run"} in WORKFLOW["jobs"]["full"]["steps"]
    matrix = WORKFLOW["jobs"]["quick"]["strategy"]["matrix"]
    assert f">={matrix['python'][0]}" == PROJECT["requires-python"]
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in matrix["torch"]
    assert len(matrix["torch"]) == 2
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    night = " ".join(step.get("run", "") for step in WORKFLOW["jobs"]["night"]["steps"])
    assert all(part in night for part in ("tests.fuzz", "VMF_FAULTS", "tests.mutations", "tests.wheel")), night
