"""Gradients computed in forward: returned once, in place, and computed again for a second backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vmf_kernels.backends.scaling import scale_in_place
from vmf_kernels.ops.ready_gradients import Form, Kept, ReadyGradients, no_gradients, once_differentiable

pytestmark = pytest.mark.quick


def never() -> Sequence[Tensor]:
    raise AssertionError("recomputed although the gradients were there")


def ready() -> list[Tensor]:
    return [torch.arange(6.0).reshape(2, 3), torch.full((4,), 3.0, dtype=torch.float64)]


@torch.no_grad()
def test_scale_one_hands_out_the_very_buffers() -> None:
    gradients = ready()
    taken = ReadyGradients(gradients, scale_in_place).take(torch.tensor(1.0), never)
    assert [t.data_ptr() for t in taken] == [g.data_ptr() for g in gradients]
    assert all(torch.equal(t, g) for t, g in zip(taken, ready(), strict=True)), f"got {taken}"


@torch.no_grad()
def test_another_scale_is_applied_in_place_and_in_the_own_dtype() -> None:
    gradients = ready()
    taken = ReadyGradients(gradients, scale_in_place).take(torch.tensor(-2.5), never)
    assert [t.data_ptr() for t in taken] == [g.data_ptr() for g in gradients]
    assert [t.dtype for t in taken] == [torch.float32, torch.float64]
    assert all(torch.equal(t, -2.5 * g) for t, g in zip(taken, ready(), strict=True)), f"got {taken}"


@torch.no_grad()
def test_asked_again_they_are_recomputed_and_not_scaled_twice() -> None:
    once = ReadyGradients(ready(), scale_in_place)
    first = [t.clone() for t in once.take(torch.tensor(3.0), never)]
    second = once.take(torch.tensor(3.0), ready)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), f"got {first} and then {second}"


def test_where_a_graph_is_recorded_they_are_kept_and_copied() -> None:
    gradients, scale = ready(), torch.tensor(2.0, requires_grad=True)
    once = ReadyGradients(gradients, scale_in_place)
    for _ in range(2):
        taken = once.take(scale, never)
        assert all(torch.equal(t, 2 * g) for t, g in zip(taken, gradients, strict=True))
        assert all(t.requires_grad for t in taken), "the gradients no longer follow their scale"


def test_what_is_differentiable_once_says_so_when_it_is_differentiated_again() -> None:
    x = torch.ones(3, requires_grad=True)
    (gradient,) = once_differentiable([torch.arange(3.0)], [x], "my_loss")
    assert torch.equal(gradient, torch.arange(3.0))
    with pytest.raises(RuntimeError, match=r"my_loss cannot be differentiated twice.*expected backward\(\)"):
        gradient.sum().backward()


def test_kept_tensors_come_back_unless_they_changed() -> None:
    with torch.inference_mode():
        inference = torch.ones(2)
    tensors = [torch.zeros(3), None, inference]
    kept = Kept(tensors, "my_loss")
    assert all(a is b for a, b in zip(kept.unchanged(), tensors, strict=True))
    assert tensors[0] is not None
    tensors[0].add_(1)
    with pytest.raises(RuntimeError, match=r"second backward pass of my_loss.*shape \[3\].*expected the teacher"):
        kept.unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_takes_shape_and_dtype_of_its_tensor(dtype: torch.dtype) -> None:
    form = Form.of(torch.empty(4, 1, dtype=dtype))
    assert form is not None
    gradient = form.cast(torch.ones(4))
    assert (tuple(gradient.shape), gradient.dtype) == ((4, 1), dtype)


def test_no_gradient_where_there_is_no_tensor() -> None:
    assert Form.of(None) is None
    assert no_gradients(3) == (None, None, None)
