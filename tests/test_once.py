"""Gradients formed in the forward pass: given away once, in place, and formed again when asked for again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vmf_kernels.once import ReadyGradients, cast_like, no_gradients


def never() -> Sequence[Tensor]:
    raise AssertionError("recomputed although the gradients were there")


def ready() -> list[Tensor]:
    return [torch.arange(6.0).reshape(2, 3), torch.full((4,), 3.0, dtype=torch.float64)]


@torch.no_grad()
def test_scale_one_hands_out_the_very_buffers() -> None:
    gradients = ready()
    taken = ReadyGradients(gradients, "loss").take(torch.tensor(1.0), never)
    assert [t.data_ptr() for t in taken] == [g.data_ptr() for g in gradients]
    assert all(torch.equal(t, g) for t, g in zip(taken, ready(), strict=True)), f"got {taken}"


@torch.no_grad()
def test_another_scale_is_applied_in_place_and_in_the_own_dtype() -> None:
    gradients = ready()
    taken = ReadyGradients(gradients, "loss").take(torch.tensor(-2.5), never)
    assert [t.data_ptr() for t in taken] == [g.data_ptr() for g in gradients]
    assert [t.dtype for t in taken] == [torch.float32, torch.float64]
    assert all(torch.equal(t, -2.5 * g) for t, g in zip(taken, ready(), strict=True)), f"got {taken}"


@torch.no_grad()
def test_asked_again_they_are_recomputed_and_not_scaled_twice() -> None:
    once = ReadyGradients(ready(), "loss")
    first = [t.clone() for t in once.take(torch.tensor(3.0), never)]
    second = once.take(torch.tensor(3.0), ready)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), f"got {first} and then {second}"


def test_recording_a_graph_of_the_backward_pass_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"my_loss cannot be differentiated twice.*expected backward\(\)"):
        ReadyGradients(ready(), "my_loss").take(torch.tensor(1.0), never)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_takes_shape_and_dtype_of_its_tensor(dtype: torch.dtype) -> None:
    gradient = cast_like(torch.ones(4), True, torch.empty(4, 1, dtype=dtype))
    assert gradient is not None
    assert (tuple(gradient.shape), gradient.dtype) == ((4, 1), dtype)


def test_no_gradient_where_none_is_needed() -> None:
    assert cast_like(torch.ones(4), False, torch.empty(4)) is None
    assert cast_like(torch.ones(0), True, None) is None
    assert no_gradients(3) == (None, None, None)
