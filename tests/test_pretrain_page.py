"""Every command of docs/pretrain.md resolves to settings, its Python runs, and its figures are those of the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.tiny import save_photos
from tests.readme_blocks import python_blocks
from vmf_pretrain.cli import main
from vmf_pretrain.config.resume import KINDS, MAY_CHANGE
from vmf_pretrain.recipes.choose import choose
from vmf_pretrain.recipes.machine import Machine, Photos
from vmf_pretrain.start import Started

pytestmark = pytest.mark.quick

PAGE = Path(__file__).parents[1] / "docs" / "pretrain.md"
TEXT = PAGE.read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with what the page speaks of, as the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("PHOTOS", "MOVED"):
        save_photos(tmp_path / name, 4)
    assert main(["fit", "--data", "PHOTOS", "--train.device", "cpu", "--print-config"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)


def arguments_of(words: list[str]) -> list[str]:
    """What follows the name of the command."""
    if words[0] == "torchrun":
        return words[words.index("vmf_pretrain") + 1 :]
    assert words[0] == "vmf-pretrain", words
    return words[1:]


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_of(words)
    if arguments[0] == "doctor":  # its examination, which takes a minute, has tests of its own
        monkeypatch.setattr("vmf_pretrain.cli.run_doctor", lambda visit: True)
        assert main(arguments) == 0, capsys.readouterr().err
        return
    if "--resume" in arguments:
        Path("runs/photos").mkdir(parents=True)
        Path("runs/photos/config.yaml").write_text(Path("mine.yaml").read_text())
    if arguments[0] == "watch":  # of a run that has ended, so that it comes to an end
        Path(arguments[1]).mkdir(parents=True)
        Path(arguments[1], "summary.json").write_text("{}")
    if arguments[0] in (
        "pictures",
        "report",
        "export",
        "embed",
    ):  # they need a finished run, and have tests of their own
        assert main(arguments) == 2
        assert arguments[1] in capsys.readouterr().err
        return
    if arguments[0] not in ("recipes", "watch") and "--print-config" not in arguments:
        arguments.append("--print-config")
    assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("_folder")
def test_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks(PAGE)

    def started(config: Any, out: Path, **options: Any) -> Started:  # the page's settings, without the hour they take
        assert (config.train.epochs, config.optim.clip, config.method) == (20, 1.0, "dino-vmf")
        out.mkdir(parents=True)
        (out / "summary.json").write_text('{"rankme": 40.0}')
        return Started(0, out)

    monkeypatch.setattr("vmf_pretrain.call.start", started)
    exec(compile(block, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "runs/photos 40.0"


def test_example_of_the_reason_is_what_is_said() -> None:
    reason = choose(Machine("cpu", 8 << 30, cores=2), Photos(1_200, 480)).reason
    assert "\n".join(reason) in TEXT


def test_page_names_what_may_change() -> None:
    told = TEXT.split("## Stop and go on")[1].split("## ")[0]
    logged = {name for name in MAY_CHANGE if name.startswith("log.")}
    logged |= {"train.log_every", "train.checkpoint_every", "train.keep_checkpoints"}
    missing = [name for name in sorted(MAY_CHANGE - logged) if f"`{name}`" not in told]
    assert not missing, f"the page does not name {missing}"
    assert all(f"`{kind}`" in told for kind in KINDS)
