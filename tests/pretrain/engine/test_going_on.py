"""What a stopped run says of how it goes on."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.engine.stopping import before_step, stopped_at
from tests.pretrain.tiny import a_run, few_digits, few_digits_config


@pytest.fixture(scope="module", autouse=True)
def digits() -> Iterator[None]:
    """Few of them: what is learned does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        yield


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_says_how_to_go_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    run, printed = a_run(few_digits_config(), tmp_path / "run")
    assert before_step(run, 2, lambda: signal.raise_signal(number)).train() == code
    text = printed.getvalue()
    assert f"Stopped by {number.name} at step 3; a checkpoint is written." in text, text
    assert f"vmf-pretrain fit --resume --out {tmp_path / 'run'}\n" in text, text
    assert not run.folder.summary.exists(), "an unfinished run has a summary"


def test_printed_command_survives_a_shell_whatever_the_folder_is_called(tmp_path: Path) -> None:
    run, printed = a_run(few_digits_config(), tmp_path / "a run's folder")
    stopped_at(run, 2)
    command = printed.getvalue().split("Go on with: ")[1]
    assert shlex.split(command)[-1] == str(tmp_path / "a run's folder"), command


def test_printed_command_keeps_the_settings_that_count_for_one_start(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    stopped_at(run, 2)
    once = few_digits_config(data={"max_bad_share": 0.5}, train={"keep_checkpoints": 7})
    again, printed = a_run(once, tmp_path / "run", resume=True)
    stopped_at(again, 3)
    command = shlex.split(printed.getvalue().split("Go on with: ")[1])
    assert command[5:] == ["--data.max_bad_share", "0.5", "--train.keep_checkpoints", "7"], command
