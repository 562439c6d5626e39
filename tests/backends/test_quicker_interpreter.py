"""The quicker interpreter gives the bits of Triton's own, and leaves the language as it was."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from tests.backends import quicker_interpreter
from vmf_kernels.testing import library_outcome, random_problem

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets nothing where there is a GPU"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]


def test_both_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(images=2, views=(2, 3), prototypes=40, dim=16, dtype=torch.float32)
    program_id = tl.program_id
    quick = library_outcome(problem, "triton")
    assert tl.program_id is program_id, "a launch has left the language changed"
    assert quicker_interpreter.PATCHED, "it was not installed"

    class Never(set[int]):
        def __contains__(self, item: object) -> bool:
            return False

    monkeypatch.setattr(quicker_interpreter, "PATCHED", Never())
    slow = library_outcome(problem, "triton")
    changed = [name for name in quick if not torch.equal(quick[name], slow[name])]
    assert not changed, f"{changed} differ"
