"""A network as an ONNX graph, or what is missing for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.pretrain.export.kept import kept_run
from tests.pretrain.tiny import digits_config
from vmf_pretrain.cli import BAD_INPUT, DONE, main
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.export import form

BUDGET = 1e-5


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(form, "installed", lambda package: package != "onnxscript")
    run = kept_run(digits_config(), tmp_path / "run")
    assert main(["export", str(run), "--to", "onnx"]) == BAD_INPUT
    assert "--to onnx needs onnxscript; install" in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.thorough
def test_graph_gives_the_features_of_any_number_of_images(tmp_path: Path) -> None:
    """torch takes six seconds to make the graph."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    run = kept_run(digits_config(), tmp_path / "run")
    assert main(["export", str(run), "--to", "onnx"]) == DONE
    found = load_evaluated(str(run), device=torch.device("cpu"))
    inputs = torch.randn(5, 1, found.fed.size, found.fed.size)
    graph = onnx.load(run / "export" / "onnx" / "model.onnx")
    (features,) = reference.ReferenceEvaluator(graph).run(["features"], {"inputs": inputs.numpy()})
    with torch.no_grad():
        difference = float((torch.from_numpy(features) - found.network(inputs)).abs().max())
    assert difference < BUDGET, f"{difference:.1e} of {BUDGET:.0e}"
    kept = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(kept["vmf_pretrain"])["input"] == found.fed.facts()
