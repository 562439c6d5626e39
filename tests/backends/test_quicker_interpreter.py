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


def test_both_give_the_same_bits() -> None:
    problem = random_problem(images=2, views=(2, 3), prototypes=40, dim=16, dtype=torch.float16)
    program_id = tl.program_id
    quick = library_outcome(problem, "triton")
    assert tl.program_id is program_id, "a launch has left the language changed"
    assert quicker_interpreter.PATCHED, "it was not installed"
    quicker_interpreter.PATCHED.clear()
    with quicker_interpreter.as_triton_has_it():
        slow = library_outcome(problem, "triton")
    assert not quicker_interpreter.PATCHED, "it was at work where it should not have been"
    changed = [name for name in quick if not torch.equal(quick[name], slow[name])]
    assert not changed, f"{changed} differ"


def test_a_shape_that_was_seen_is_described_alike_and_a_wrong_one_raises() -> None:
    first, second = (tl.block_type(dtype, [16, 32]) for dtype in (tl.float32, tl.float16))
    assert (first.name, first.numel) == ("<['16', '32'], fp32>", 512), first.name
    assert second == tl.block_type(tl.float16, [tl.constexpr(16), 32]) != first
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [16, 33])
