"""bench.vit_step at toy size: every variant trains the same networks."""

from __future__ import annotations

import pytest

from bench.report import vit_table
from bench.vit_step import PHASES, TOY, measure


def test_variants_take_the_same_steps_and_say_what_they_took() -> None:
    published, ours = measure(TOY, 2, ["published loss", "ours"])
    assert published["losses"] == pytest.approx(ours["losses"], rel=1e-4)
    assert published["losses"][0] != published["losses"][1], "nothing was learnt between two steps"
    for row in (published, ours):
        assert min(row["phases"][phase] for phase in PHASES) > 0
        assert 0 < row["head_share"] < 1
        assert row["peak_mib"] > 0
    assert vit_table({"rows": [published, ours]}).count("\n| ") == 2
