"""KoLeo of features against its formula written row by row, also where a naive formula gives infinity."""

from __future__ import annotations

import math

import pytest
import torch

from tests.fuzz.statements.spread import koleo
from tests.measure import relative_error
from vmf_kernels.losses.koleo import DistributedKoLeoLoss, KoLeoLoss

pytestmark = pytest.mark.quick

EPS = 1e-8


@pytest.mark.parametrize(
    ("dtype", "budget"), [pytest.param(torch.float64, 1e-10, id="fp64"), pytest.param(torch.float32, 1e-5, id="fp32")]
)
@pytest.mark.parametrize(("rows", "topk"), [(2, 1), (3, 1), (33, 1), (3, 2), (33, 2), (33, 5)])
def test_koleo_equals_its_formula(rows: int, topk: int, dtype: torch.dtype, budget: float) -> None:
    features = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    truth = features.detach().double().requires_grad_()
    loss, expected = KoLeoLoss(topk=topk)(features), koleo(truth, EPS, topk)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, features), torch.autograd.grad(expected, truth)
    # the gradient's size is that of its terms, 1 / distance: with two rows they cancel up to the normalisation
    error = max(relative_error(loss, expected), relative_error(gradient, expected_gradient))
    assert error <= budget, f"relative error {error:.2e}, budget {budget:.0e}"


def test_mean_over_all_neighbours_is_not_koleo() -> None:
    """Negative control: the second nearest row gives another loss."""
    features = torch.randn(9, 8, dtype=torch.float64)
    rows = torch.nn.functional.normalize(features)
    second = torch.cdist(rows, rows).topk(3, largest=False).values[:, 2]
    assert abs(KoLeoLoss()(features) + second.log().mean()) > 1e-2


def test_top_k_averages_logarithms_not_distances() -> None:
    """Negative control."""
    features = torch.randn(9, 8, dtype=torch.float64)
    rows = torch.nn.functional.normalize(features)
    nearest = torch.cdist(rows, rows).topk(4, largest=False).values[:, 1:]
    loss = KoLeoLoss(topk=3)(features)
    assert abs(loss + nearest.log().mean()) < 1e-6
    assert abs(loss + nearest.mean(dim=1).log().mean()) > 1e-3


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("crops", [1, 2, 3])
def test_crops_are_summed_and_never_compared(crops: int, topk: int) -> None:
    images = torch.randn(7, 8, dtype=torch.float64)
    views = [images + 1e-3 * torch.randn_like(images) for _ in range(crops)]
    loss = KoLeoLoss(topk=topk, crops=crops)(torch.cat(views))
    expected = torch.stack([koleo(view, EPS, topk) for view in views]).sum()
    error = relative_error(loss, expected)
    assert error <= 1e-10, f"relative error {error:.2e}, budget 1e-10"
    if crops > 1:  # negative control: as one crop, the views of an image are each other's neighbours
        assert KoLeoLoss(topk=topk)(torch.cat(views)) - loss / crops > 1


@pytest.mark.parametrize(("topk", "crops"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_without_a_process_group_the_distributed_loss_is_the_local_one(topk: int, crops: int) -> None:
    features = torch.randn(12, 8, requires_grad=True)
    losses = [loss(topk=topk, crops=crops)(features) for loss in (KoLeoLoss, DistributedKoLeoLoss)]
    gradients = [torch.autograd.grad(loss, features)[0] for loss in losses]
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def test_gradient_flows_to_the_row_and_to_its_neighbour() -> None:
    angles = torch.tensor([0.0, 0.1, 3.0], requires_grad=True)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    KoLeoLoss()(features).backward()
    assert angles.grad is not None
    pushed = angles.grad.sign().tolist()
    assert pushed[:2] == [1.0, -1.0], f"gradient {angles.grad.tolist()}: descent must part the two near rows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("topk", [1, 3])
def test_duplicates_have_a_finite_loss_and_gradient(dtype: torch.dtype, topk: int) -> None:
    features = torch.randn(4, 8).repeat(4, 1).to(dtype).requires_grad_()
    loss = KoLeoLoss(topk=topk)(features)
    loss.backward()
    assert loss.isfinite()
    assert loss > 5, f"loss {loss.item():.2f}: duplicates must cost"
    assert features.grad is not None
    assert features.grad.dtype == dtype
    assert features.grad.isfinite().all()


def test_fp16_features_are_measured_in_fp32() -> None:
    features = torch.randn(9, 8).half()
    loss, expected = KoLeoLoss()(features), koleo(features.double())
    error = relative_error(loss, expected)
    assert loss.dtype == torch.float32
    assert error <= 1e-5, f"relative error {error:.2e}, budget 1e-05"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_koleo(dtype: torch.dtype) -> None:
    angles = torch.tensor(
        [0.0, 0.05, -0.01]
    )  # in half precision the first row is as near to the second as to the third
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", dtype=dtype):
        loss = KoLeoLoss()(features)
    error = relative_error(loss, koleo(features.double()))
    assert error <= 1e-5, f"relative error {error:.2e}, budget 1e-05"


def test_zero_rows_have_a_finite_gradient() -> None:
    features = torch.randn(5, 8)
    features[[1, 3]] = 0
    features.requires_grad_()
    KoLeoLoss()(features).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (8,), (2, 3, 8), ()])
def test_features_without_a_neighbour_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"features have shape \(.*\); expected \[B, D\] with B >= 2 rows"):
        KoLeoLoss()(torch.randn(shape))


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (3, {"topk": 3}, r"\[B, D\] with B >= 4 rows"),
        (7, {"crops": 2}, r"\[2 \* B, D\] with B >= 2 rows"),
        (2, {"crops": 2}, r"\[2 \* B, D\] with B >= 2 rows"),
    ],
    ids=["topk", "uneven-crops", "crops-of-one"],
)
@pytest.mark.parametrize("loss", [KoLeoLoss, DistributedKoLeoLoss])
def test_too_few_rows_are_refused(loss: type[KoLeoLoss], rows: int, options: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"features have shape \({rows}, 8\); expected {expected}"):
        loss(**options)(torch.randn(rows, 8))


@pytest.mark.parametrize("name", ["topk", "crops"])
def test_a_count_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 0; expected an int >= 1"):
        KoLeoLoss(**{name: 0})


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_an_eps_that_is_not_positive_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps is .*; expected a number > 0"):
        KoLeoLoss(eps)
