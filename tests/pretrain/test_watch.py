"""``vmf-pretrain watch``: a run of another process, before, while and after it goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vmf_pretrain.cli import main
from vmf_pretrain.storage.lines import Followed
from vmf_pretrain.storage.lock import LOCK, RunLock
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.watch_command import LEFT, Watch

pytestmark = pytest.mark.quick

SOON = 10.0  # seconds
QUICKLY = 0.02
RECORDS: list[dict[str, Any]] = [
    {"step": 0, "knn": 52.6},
    {"step": 10, "steps": 30, "epoch": 1, "loss": 5.0},
    {"step": 10, "warning": "diverging", "words": "Diverging: it jumps.", "evidence": [], "try": ["lower the rate"]},
    {"step": 20, "steps": 30, "epoch": 2, "loss": 4.0},
    {"step": 30, "steps": 30, "epoch": 3, "loss": 3.0},
]
SUMMARY = {"verdict": {"kind": "alive", "words": "Alive: nothing has collapsed."}}


def append(run: Path, records: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def watched(run: Path) -> str:
    """What is shown of a run that has ended."""
    printed = io.StringIO()
    Watch(RunFolder(run), Console(file=printed, width=200), QUICKLY).follow()
    return printed.getvalue()


def test_run_that_has_ended_is_told_with_its_verdict(tmp_path: Path) -> None:
    append(tmp_path / "run", RECORDS)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    lines = watched(tmp_path / "run").splitlines()
    assert lines[0] == "WARNING at step 10: Diverging: it jumps. Try: lower the rate."
    assert lines[1].startswith("step 30/30  loss 3.000")
    assert lines[2] == "The run has ended at step 30 of 30. Alive: nothing has collapsed."


def test_run_that_was_stopped_and_one_that_was_killed_say_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    append(run, RECORDS[:-1])
    assert "The run has stopped at step 20 of 30. Go on with: vmf-pretrain fit --resume --out " in watched(run)
    code = "import os, sys; from pathlib import Path; from vmf_pretrain.storage.lock import RunLock; "
    code += "RunLock.take(Path(sys.argv[1])); os._exit(9)"
    process = subprocess.Popen([sys.executable, "-c", code, str(run)])
    process.wait()
    assert (run / LOCK).exists()
    assert f"was killed: process {process.pid} ended after step 20 of 30" in watched(run)


def test_run_is_followed_from_before_its_start_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = io.StringIO()
    watch = Watch(RunFolder(run), Console(file=printed, width=200), QUICKLY)
    thread = threading.Thread(target=watch.follow, daemon=True)
    thread.start()
    wait_for("Waiting for the run", printed)
    with RunLock.take(run):
        for record in RECORDS:
            append(run, [record])
            if "loss" in record:
                wait_for(f"step {record['step']}/30", printed)
        assert thread.is_alive()
        (run / "summary.json").write_text(json.dumps(SUMMARY))
    thread.join(SOON)
    assert not thread.is_alive()
    assert printed.getvalue().splitlines()[-1].startswith("The run has ended at step 30 of 30.")
    assert printed.getvalue().count("WARNING") == 1


def wait_for(text: str, printed: io.StringIO) -> None:
    until = time.monotonic() + SOON
    while text not in printed.getvalue():
        assert time.monotonic() < until, f"no {text!r} in {printed.getvalue()!r}"
        time.sleep(QUICKLY)


def test_a_half_written_record_waits_and_a_shorter_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    followed = Followed(path)
    assert followed.new() == []
    path.write_text('{"step": 1}\n{"st')
    assert followed.new() == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert followed.new() == [{"step": 2}]
    assert followed.new() == []
    path.write_text('{"step": 1}\n')
    assert followed.new() == [{"step": 1}]


def test_path_of_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["watch", str(tmp_path / "file")]) == 2
    assert "is a file; expected the folder of a run." in capsys.readouterr().err


def test_ctrl_c_leaves_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "vmf_pretrain", "watch", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert "Waiting for the run" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=SOON)
    assert (process.returncode, errors) == (0, "")
    assert LEFT in printed
