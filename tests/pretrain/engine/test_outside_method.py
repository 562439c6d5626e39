"""A method that the package does not know trains, resumes bit for bit, logs and is evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.pretrain.engine.stopping import state_of, stopped_at
from tests.pretrain.tiny import a_run, differing, digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.storage.metrics import read_metrics

NAME = "tests.pretrain.engine.outside_method:Turns"


def test_method_from_outside_trains_resumes_logs_and_is_evaluated(tmp_path: Path) -> None:
    config = digits_config(method=NAME, train={"epochs": 3})
    whole, printed = a_run(config, tmp_path / "whole", allow_code=True)
    assert whole.train() == 0
    stopped, _ = a_run(config, tmp_path / "stopped", allow_code=True)
    assert stopped_at(stopped, 6) == 130
    again, _ = a_run(
        read_config(tmp_path / "stopped" / "config.yaml"), tmp_path / "stopped", resume=True, allow_code=True
    )
    assert again.train() == 0
    assert differing(state_of(again), state_of(whole)) == []
    losses = [record["total"] for record in read_metrics(whole.folder) if "total" in record]
    assert len(losses) == 15
    assert losses[-1] < losses[0] < 2 * math.log(4), f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}"
    summary = json.loads(whole.folder.summary.read_text())
    assert summary["knn"] > 0
    assert summary["mutual_information"] is None
    assert "Too short to say: the last logged step is 15" in printed.getvalue()
    assert "prototypes used" not in printed.getvalue()
    assert (whole.folder.weights / "last.safetensors").stat().st_size


@pytest.mark.quick
def test_module_is_not_imported_without_permission(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="would import code; pass --allow-code"):
        a_run(digits_config(method=NAME), tmp_path / "run")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dnio", "must be one of"),
        ("no.such.module:X", "cannot be imported"),
        ("tests.pretrain.engine.outside_method:Nothing", "cannot be imported"),
        ("json:JSONDecoder", "is no class derived from"),
    ],
)
def test_wrong_method_is_named(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=said):
        a_run(digits_config(method=name), tmp_path / "run", allow_code=True)
