"""The figures of the model card."""

from vmf_pretrain.export.card import _figures


def test_figures_of_another_step_are_said_to_be_of_it() -> None:
    summary = {"knn": 50.0, "best_knn": 61.0, "steps": 20}
    assert "after 20 steps, not of these weights" in _figures(summary, 10)
    assert "not of these weights" not in _figures(summary, 20)
