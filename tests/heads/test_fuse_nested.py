"""Heads inside other modules: fused whole, or refused where it is not clear which one is meant."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from vmf_kernels import PrototypeLogits
from vmf_kernels.heads.fuse import FusedLinear, fuse_head

pytestmark = pytest.mark.quick

DIM, PROTOTYPES, OTHERS = 8, 12, 7


class Head(nn.Module):
    """As iBOT's: its last layers do not follow each other, and a submodule without children comes after them."""

    def __init__(self, *, two: bool = True) -> None:
        super().__init__()
        self.last_layer = nn.Linear(DIM, PROTOTYPES, bias=False)
        if two:
            self.last_layer2 = nn.Linear(DIM, OTHERS, bias=False)
        self.mlp = nn.Linear(DIM, DIM, bias=False)


class Wrapper(nn.Module):
    """A backbone, a head, and a projection that is the last of all leaves."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Linear(DIM, DIM, bias=False)
        self.head = head
        self.proj = nn.Linear(DIM, DIM, bias=False)


def fused(module: nn.Module) -> list[str]:
    """Names of the layers that have been fused."""
    return [name for name, layer in module.named_modules() if isinstance(layer, FusedLinear)]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_both_last_layers_are_fused_at_any_depth_and_nothing_else(depth: int) -> None:
    module: nn.Module = Head()
    for _ in range(depth):
        module = Wrapper(module)
    prefix = "head." * depth
    assert fused(fuse_head(module)) == [f"{prefix}last_layer", f"{prefix}last_layer2"]


def test_a_layer_of_that_name_goes_before_a_later_leaf() -> None:
    module = Wrapper(Head(two=False))
    assert fused(fuse_head(module)) == ["head.last_layer"]
    logits = module.head.last_layer(torch.ones(2, DIM))  # type: ignore[operator]
    assert isinstance(logits, PrototypeLogits)


def test_without_such_a_name_the_last_leaf_is_fused() -> None:
    """Negative control of the one above."""
    assert fused(fuse_head(Wrapper(nn.Linear(DIM, PROTOTYPES, bias=False)))) == ["proj"]


@pytest.mark.parametrize("place", ["backbone", "proj"])
def test_two_heads_are_refused_and_left_alone(place: str) -> None:
    module = Wrapper(Head())
    setattr(module, place, Head())
    said = ", ".join(name for name, child in module.named_children() if isinstance(child, Head))
    message = f"Wrapper has a last_layer or last_layer2 in several places: {said}; expected one head, or fuse_head"
    with pytest.raises(ValueError, match=re.escape(message)):
        fuse_head(module)
    assert fused(module) == []


def test_each_of_two_heads_can_be_named() -> None:
    module = Wrapper(Head())
    module.backbone = Head()  # type: ignore[assignment]
    fuse_head(fuse_head(module, layer="head.last_layer"), layer="backbone.last_layer2")
    assert fused(module) == ["backbone.last_layer2", "head.last_layer"]


def test_one_head_under_two_names_is_one_head() -> None:
    head = Head()
    module = Wrapper(head)
    module.proj = head  # type: ignore[assignment]
    assert fused(fuse_head(module)) == ["head.last_layer", "head.last_layer2"]


def test_a_nested_head_of_which_one_layer_does_not_fit_is_left_alone() -> None:
    module = Wrapper(Head())
    module.head.last_layer2 = nn.Linear(DIM, OTHERS)
    with pytest.raises(ValueError, match=r"'head.last_layer2' is a Linear with a bias"):
        fuse_head(module)
    assert fused(module) == []
