"""The command: what it writes, what it refuses, and its exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretrain.tiny import one_sentence
from vmf_bench import cli, measure, plan, roof, run
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.stored import published
from vmf_bench.variants import VARIANTS, Variant

SMALL = ["--rows", "10", "--prototypes", "64", "--dim", "16", "--dtype", "float32", "--quick"]


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two main sizes alone, in few rounds, and rates of little work; on the CPU wherever it runs."""
    monkeypatch.setattr(plan, "FACTORS", ())
    monkeypatch.setattr(measure, "MOST_ROUNDS", measure.LEAST_ROUNDS)
    monkeypatch.setitem(roof.LARGEST_MM, "cpu", roof.SMALLEST_MM)
    monkeypatch.setitem(roof.COPIED_BYTES, "cpu", 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "7"], "--rows got 7; expected a positive multiple of 10"),
        (["--prototypes", "-3"], "--prototypes got -3; expected 16 or more"),
        (["--dim", "12"], "--dim got 12; expected a multiple of 8"),
        (["--only", "native", "nativ"], "--only got 'nativ'; expected some of native, triton,"),
        (["--out", "{tmp}/file/below"], "/file/below, which cannot be written: Not a directory"),
        (["--out", "{tmp}/taken"], "/taken, which cannot be written: Is a directory"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf_bench.run.run", None)  # nothing is measured
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "vmf-bench.json").mkdir(parents=True)
    code = cli.main([argument.format(tmp=tmp_path) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 2, f"exit status {code}"
    assert printed.out == "", "it began to measure"
    assert printed.err.startswith("vmf-bench: ")
    assert one_sentence(printed.err), printed.err
    assert said in printed.err


@pytest.mark.parametrize("arguments", [["--rows", "many"], ["--dtype", "int8"], ["--speed"]])
def test_arguments_that_do_not_parse_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: vmf-bench" in capsys.readouterr().err


@pytest.mark.quick
def test_list_names_every_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(VARIANTS)


@pytest.mark.quick
@pytest.mark.usefixtures("_short")
def test_a_run_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    arguments = [*SMALL, "--only", "streaming", "one-log-softmax", "triton", "--out", str(out)]
    assert cli.main(arguments) == 0
    record: dict[str, Any] = json.loads((out / "vmf-bench.json").read_text(encoding="utf-8"))
    assert record["schema_version"] == run.SCHEMA_VERSION
    assert record["command"] == "vmf-bench " + " ".join([*SMALL, "--only", "streaming", "one-log-softmax", "triton"])
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert [case["part"] for case in record["cases"]] == ["main", "main"], f"left out: {record['left_out']}"
    names = {row["name"] for case in record["cases"] for row in case["rows"]}
    assert names == {"streaming", "one-log-softmax", "triton", "published"}, "the published loss is always there"
    printed = capsys.readouterr().out
    row = next(row for row in record["cases"][0]["rows"] if row["name"] == "streaming")
    assert re.search(rf"^\* streaming +{1e3 * row['median']:.2f} ", printed, re.MULTILINE), printed
    assert "triton: not available: it needs an NVIDIA GPU" in printed
    keys = set(re.findall(r"`(\w+)`", (Path(cli.__file__).parent / "README.md").read_text(encoding="utf-8")))
    assert set(record) <= keys | {"schema_version"}, f"the README lacks {set(record) - keys}"


@pytest.mark.usefixtures("_short")
def test_a_wrong_loss_of_this_library_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: HeadInputs) -> Tensor:
        return 1.1 * published(inputs)

    monkeypatch.setitem(VARIANTS, "streaming", Variant("wrong", lambda inputs, compile_: wrong))
    assert cli.main([*SMALL, "--only", "streaming"]) == 1
