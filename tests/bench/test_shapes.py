"""The table of shapes: the losses that it compares with are the same loss, and every shape of it is there once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import shapes
from bench.gpu.agreement import exact_outcome
from bench.report import table
from bench.shapes import Case, crops, one_image, published_loss
from vmf_bench.agreement import outcome_of, relative_errors
from vmf_bench.check import refuse_disagreement
from vmf_bench.inputs import HeadInputs, HeadShape, matched_shape
from vmf_bench.ours import ours
from vmf_bench.peers.stored import one_log_softmax

TINY = (crops(3, 301, 32, views=4), matched_shape(7, prototypes=301, dim=32), one_image(9, 301, 32))
LOSSES = {"published": published_loss, "one_softmax": one_log_softmax, "ours": ours("auto")}


@pytest.mark.quick
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_every_loss_of_the_table_is_the_same(shape: HeadShape, name: str) -> None:
    inputs = HeadInputs.of(shape, device=torch.device("cpu"), dtype=torch.float32)
    refuse_disagreement(relative_errors(outcome_of(LOSSES[name], inputs), exact_outcome(inputs)[0]), torch.float32)


@pytest.mark.quick
def test_every_shape_is_in_the_table_once_and_the_quick_one_has_every_pairing() -> None:
    titles = [shapes.title_of(case) for case in shapes.SHAPES]
    assert len(set(titles)) == len(titles)
    assert {case.pairing for case in shapes.SHAPES if case.quick} == {"multi-crop", "matched", "one image"}


def test_a_run_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", tuple(map(Case, TINY)))
    monkeypatch.setattr(shapes, "SECONDS_A_SHAPE", 0.0)
    monkeypatch.setattr(shapes, "MM_SIZE", 64)
    monkeypatch.setattr(shapes, "has_bf16_products", lambda: True)
    path = tmp_path / "shapes.json"
    shapes.main(["--no-compile", "--threads", "1", "--only", "matched", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["pairing"], row["dtype"], row["threads"]) for row in rows] == [
        ("matched", "fp32", 1),
        ("matched", "bf16", 1),
    ]
    assert all(len(times) >= shapes.LEAST_ROUNDS for row in rows for times in row["seconds"].values())
    lines = table(path).splitlines()
    assert f"{shapes.over_the_best(rows[0]):.2f}" in lines[-2]
    assert lines[-1].startswith("| matched | 7/7 | 301 | 32 | bf16 | 1 |")
