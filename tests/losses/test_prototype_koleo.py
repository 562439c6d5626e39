"""KoLeo of prototypes against the dense formula in fp64, and what it allocates.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.spread import prototype_koleo as dense_koleo
from tests.measure import Allocations, allocations_of, relative_error
from vmf_kernels.losses import prototype_koleo
from vmf_kernels.losses.prototype_koleo import PrototypeKoLeoLoss
from vmf_kernels.prototypes import Prototypes, linear_prototypes, normalized_prototypes, weight_norm_prototypes

pytestmark = pytest.mark.quick

EPS = 1e-8
DIM = 6
# K, tile, block of distances
SIZES = [
    (2, 2048, 4096),
    (3, 2, 2),
    (127, 16, 5),
    (127, 127, 127),
    (128, 127, 1000),
    (1000, 64, 300),
    (2049, 2048, 4096),
]


def cut_into(monkeypatch: pytest.MonkeyPatch, tile: int, block: int) -> None:
    monkeypatch.setattr(prototype_koleo, "TILE", tile)
    monkeypatch.setattr(prototype_koleo, "BLOCK", block)


def random_weight(prototypes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[K, D] rows of norms over two orders of magnitude."""
    return torch.randn(prototypes, DIM, dtype=dtype) * 10 ** (2 * torch.rand(prototypes, 1, dtype=dtype) - 1)


@pytest.mark.parametrize(
    ("dtype", "budget"), [pytest.param(torch.float64, 1e-11, id="fp64"), pytest.param(torch.float32, 1e-4, id="fp32")]
)
@pytest.mark.parametrize(("prototypes", "tile", "block"), SIZES)
def test_loss_and_gradient_equal_the_dense_formula(
    prototypes: int, tile: int, block: int, dtype: torch.dtype, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(monkeypatch, tile, block)
    weight = random_weight(prototypes, dtype).requires_grad_()
    truth = weight.detach().double().requires_grad_()
    loss, expected = PrototypeKoLeoLoss()(weight), dense_koleo(truth)
    (gradient,), (expected_gradient,) = torch.autograd.grad(3 * loss, weight), torch.autograd.grad(3 * expected, truth)
    assert loss.dtype == gradient.dtype == dtype
    error = max(relative_error(loss, expected), relative_error(gradient, expected_gradient))
    assert error <= budget, f"relative error {error:.2e}, budget {budget:.0e}"


def test_gradient_without_the_neighbours_part_is_another() -> None:
    """Negative control."""
    weight = random_weight(50).requires_grad_()
    (gradient,) = torch.autograd.grad(PrototypeKoLeoLoss()(weight), weight)
    directions = functional.normalize(weight)
    nearest = (directions @ directions.T).fill_diagonal_(-1).argmax(dim=1)
    one_sided = -((directions - directions[nearest].detach()).norm(dim=1) + EPS).log().mean()
    (half,) = torch.autograd.grad(one_sided, weight)
    assert relative_error(half, gradient) > 0.1


@pytest.mark.parametrize("forget", ["rows", "columns"])
def test_each_side_of_a_tile_is_needed(forget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: maxima over one side of the tiles off the diagonal give another loss."""
    cut_into(monkeypatch, 16, 16)
    weight = random_weight(127)
    improve = prototype_koleo._improve

    def one_sided(best: Tensor, index: Tensor, tile: Tensor, first: int, dim: int) -> None:
        if dim != ["columns", "rows"].index(forget) or tile.diagonal()[0] == -math.inf:
            improve(best, index, tile, first, dim)

    monkeypatch.setattr(prototype_koleo, "_improve", one_sided)
    assert relative_error(PrototypeKoLeoLoss()(weight), dense_koleo(weight)) > 1e-3


@pytest.mark.parametrize("sign", ["all", "some"])
def test_gradient_passes_gradcheck(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 2, 3)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    magnitude = torch.rand(7, 1, dtype=torch.float64) + 0.5
    if sign == "some":
        magnitude[::2] *= -1
    assert torch.autograd.gradcheck(lambda v: PrototypeKoLeoLoss()(weight_norm_prototypes(magnitude, v)), (weight,))


@pytest.mark.parametrize(
    "make",
    [linear_prototypes, normalized_prototypes, lambda weight: linear_prototypes(weight).with_vmf()],
    ids=["linear", "normalized", "vmf"],
)
def test_prototypes_of_every_kind_are_measured_by_direction(make: Callable[[Tensor], Prototypes]) -> None:
    weight = random_weight(60)
    assert torch.equal(PrototypeKoLeoLoss()(make(weight)), PrototypeKoLeoLoss()(weight))


@pytest.mark.parametrize("shape", [(60, 1), (60,)])
def test_weight_norm_gets_a_gradient_at_its_directions_only(shape: tuple[int, ...]) -> None:
    direction, magnitude = (
        random_weight(60).requires_grad_(),
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
    )
    prototypes = weight_norm_prototypes(magnitude, direction)
    loss, expected = PrototypeKoLeoLoss()(prototypes), dense_koleo(prototypes.effective_weight())
    loss.backward()
    expected_gradient, zero = torch.autograd.grad(expected, (direction, magnitude))
    assert direction.grad is not None
    error = max(relative_error(loss, expected), relative_error(direction.grad, expected_gradient))
    assert error <= 1e-11, f"relative error {error:.2e}, budget 1e-11"
    assert magnitude.grad is None
    assert zero.norm() < 1e-12 * expected_gradient.norm()
    # negative control: negative magnitudes turn directions round
    assert relative_error(PrototypeKoLeoLoss()(direction), expected) > 1e-3


def test_gradient_is_orthogonal_to_each_prototype() -> None:
    weight = random_weight(60, torch.float32).requires_grad_()
    PrototypeKoLeoLoss()(weight).backward()
    assert weight.grad is not None
    cosine = functional.cosine_similarity(weight.detach(), weight.grad).abs().max().item()
    assert cosine < 1e-5, f"largest cosine {cosine:.1e}"


def test_descent_parts_the_two_nearest() -> None:
    angles = torch.tensor([0.0, 0.1, 3.0], requires_grad=True)
    PrototypeKoLeoLoss()(torch.stack([angles.cos(), angles.sin()], dim=1)).backward()
    assert angles.grad is not None
    assert angles.grad.sign().tolist()[:2] == [1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_duplicates_cost_the_most_and_get_no_gradient_from_each_other(dtype: torch.dtype) -> None:
    weight = torch.randn(1, DIM).repeat(9, 1).to(dtype).requires_grad_()
    loss = PrototypeKoLeoLoss()(weight)
    loss.backward()
    assert math.isclose(loss.item(), -math.log(EPS), rel_tol=1e-6)
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert weight.grad.eq(0).all()


def test_near_duplicates_have_a_finite_loss_and_gradient() -> None:
    weight = (torch.randn(20, DIM).repeat(5, 1) * (1 + 1e-7 * torch.randn(100, DIM))).requires_grad_()
    loss = PrototypeKoLeoLoss()(weight)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


@pytest.mark.parametrize("zeros", [1, 2, 5])
def test_zero_prototypes_are_finite_and_get_no_gradient(zeros: int) -> None:
    weight = torch.randn(9, DIM)
    weight[:zeros] = 0
    weight.requires_grad_()
    loss = PrototypeKoLeoLoss()(weight)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad[:zeros].eq(0).all()
    assert weight.grad[zeros:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_prototypes_are_measured_in_fp32(dtype: torch.dtype) -> None:
    weight = random_weight(99).to(dtype)
    loss = PrototypeKoLeoLoss()(weight)
    assert loss.dtype == torch.float32
    error = relative_error(loss, dense_koleo(weight.double()))
    assert error <= 1e-5, f"relative error {error:.2e}, budget 1e-05"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    weight = random_weight(99, torch.float32).requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = PrototypeKoLeoLoss()(weight)
            results.append((loss, *torch.autograd.grad(loss, weight)))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


def test_repeats_are_bitwise_equal_with_any_neighbour_shared() -> None:
    """Many prototypes share a neighbour, so that the order of its sum matters."""
    weight = (torch.randn(40, DIM).repeat(50, 1) + 0.1 * torch.randn(2000, DIM)).requires_grad_()
    loss = PrototypeKoLeoLoss()(weight)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
    assert torch.equal(first, torch.autograd.grad(PrototypeKoLeoLoss()(weight), weight)[0])


def test_it_cannot_be_differentiated_twice() -> None:
    weight = random_weight(5).requires_grad_()
    (gradient,) = torch.autograd.grad(PrototypeKoLeoLoss()(weight), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="PrototypeKoLeoLoss cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), weight)


def test_a_step_allocates_tiles_and_copies_of_the_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 256, 500)
    prototypes, dim = 3000, 16
    weight = torch.randn(prototypes, dim, requires_grad=True)

    def allocations(loss: Callable[[Tensor], Tensor]) -> Allocations:
        def step() -> None:
            weight.grad = None
            loss(weight).backward()

        return allocations_of(step)

    found, dense = allocations(PrototypeKoLeoLoss()), allocations(dense_koleo)
    copy, tile = prototypes * dim * 4, prototype_koleo.TILE**2 * 4
    assert found.largest <= max(tile, copy), f"one allocation of {found.largest} bytes"
    # a tile's improved rows are gathered, in the first tile all of them
    budget = 2 * tile + 4 * copy
    assert found.peak <= budget, f"{found.peak} bytes at once, budget {budget}"
    assert dense.largest >= prototypes**2 * 4 > budget, "negative control: the dense formula's matrix goes unseen"


def test_a_single_prototype_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a single prototype, which has no neighbour; expected K >= 2"):
        PrototypeKoLeoLoss()(torch.randn(1, DIM))


@pytest.mark.parametrize("weight", [torch.randn(3), torch.ones(3, 4, dtype=torch.int64), torch.randn(3, 1)])
def test_a_tensor_that_holds_no_prototypes_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight is torch\..*; expected a floating-point matrix \[K, D\]"):
        PrototypeKoLeoLoss()(weight)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_an_eps_that_is_not_positive_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps is .*; expected a number > 0"):
        PrototypeKoLeoLoss(eps)


@pytest.mark.parametrize("freed", ["weight", "magnitude"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_freed_prototypes_are_refused_not_read(when: str, freed: str) -> None:
    magnitude, weight = torch.ones(9, 1), random_weight(9).requires_grad_()
    prototypes = weight_norm_prototypes(magnitude, weight)
    storage = {"weight": weight, "magnitude": magnitude}[freed].untyped_storage()
    if when == "forward":
        storage.resize_(0)
        with pytest.raises(RuntimeError, match="has been freed"):
            PrototypeKoLeoLoss()(prototypes)
        return
    loss = PrototypeKoLeoLoss()(prototypes)
    storage.resize_(0)
    if freed == "magnitude":  # whose signs were kept
        loss.backward()
        assert weight.grad is not None
        return
    with pytest.raises(RuntimeError, match="has been freed"):
        loss.backward()


def test_freed_plain_prototypes_are_refused_not_read() -> None:
    weight = random_weight(9).requires_grad_()
    loss = PrototypeKoLeoLoss()(weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        PrototypeKoLeoLoss()(linear_prototypes(weight))
    with pytest.raises(RuntimeError, match="has been freed"):
        loss.backward()
