"""Memory that runs out in the middle of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.pretrain.engine.stopping import resumed, state_of
from tests.pretrain.tiny import a_run, differing
from tests.reliability.runs import Ended, small_digits
from vmf_pretrain.crash import explained

CALLS = 4  # of the backward pass, in the last of which memory runs out


def test_a_step_that_ran_out_of_memory_says_so_and_is_done_again_to_the_same_bits(
    whole: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the backward pass, when the centre has moved and the gradients are there."""
    run, _ = a_run(small_digits(), tmp_path / "run")
    calls, backward = [], run.loop.wrapped.backward

    def refused(loss: Tensor) -> None:
        calls.append(run.step)
        backward(loss)
        if len(calls) == CALLS:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.loop.wrapped, "backward", refused)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.train()
    said = explained(caught.value, tmp_path / "run")
    assert "--train.accumulate 2" in said, said
    assert "fit --resume" in said, said
    again = resumed(tmp_path / "run")
    assert again.train() == 0
    assert differing(state_of(again), whole.state) == []
