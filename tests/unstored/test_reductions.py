"""Extremes, sums and means of logits that are not stored, against those of stored ones.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.measure import allocations_of
from tests.unstored.row_operations import DIM, PROTOTYPES, ROWS, by_image, make_logits
from vmf_kernels import PrototypeLogits, TeacherTargets, linear_prototypes
from vmf_kernels.unstored import reductions

pytestmark = pytest.mark.quick

Operation = Callable[[Any], Any]


@pytest.fixture(params=["one-tile", "many-tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles smaller than the logits, and than their dims of rows."""
    if request.param == "many-tiles":
        monkeypatch.setattr(reductions, "TILE_ROWS", 5)
        monkeypatch.setattr(reductions, "TILE_PROTOTYPES", 3)


# each on rows [12, K]
OVER_PROTOTYPES: dict[str, Operation] = {
    "max": lambda x: x.max(),
    "max-dim": lambda x: x.max(dim=1),
    "max-dim-of-images": lambda x: by_image(x).max(-1),
    "max-keepdim": lambda x: by_image(x).max(2, keepdim=True),
    "max-axis": lambda x: x.max(axis=-1)[0],
    "max-of-a-row": lambda x: x[0].max(0),
    "torch.max": lambda x: torch.max(x),
    "torch.max-dim": lambda x: torch.max(x, dim=1),
    "torch.max-keywords": lambda x: torch.max(input=x, dim=1, keepdim=True),
    "min": lambda x: x.min(),
    "min-dim": lambda x: x.min(dim=1),
    "amax": lambda x: by_image(x).amax(),
    "amax-dim": lambda x: x.amax(-1),
    "amax-dims": lambda x: by_image(x).amax((0, -1)),
    "amax-dims-keepdim": lambda x: by_image(x).amax((1, 2), keepdim=True),
    "amin-dims": lambda x: torch.amin(by_image(x), dim=(1, 2)),
    "argmax": lambda x: x.argmax(),
    "argmax-keepdim": lambda x: by_image(x).argmax(keepdim=True),
    "argmax-dim": lambda x: x.argmax(-1),
    "argmax-dim-keepdim": lambda x: x.argmax(dim=-1, keepdim=True),
    "torch.argmax": lambda x: torch.argmax(x, -1),
    "argmin": lambda x: by_image(x).argmin(),
    "argmin-dim": lambda x: by_image(x).argmin(dim=2),
    "topk": lambda x: x.topk(4),
    "topk-smallest": lambda x: by_image(x).topk(5, dim=-1, largest=False),
    "topk-all": lambda x: x.topk(PROTOTYPES),
    "topk-none": lambda x: x.topk(0),
    "torch.topk": lambda x: torch.topk(x, 1, dim=1)[1],
    "mean": lambda x: x.mean(),
    "mean-dim": lambda x: by_image(x).mean(dim=-1),
    "mean-rows": lambda x: x.mean(0),
    "mean-rows-keepdim": lambda x: x.mean(dim=0, keepdim=True),
    "mean-dims": lambda x: by_image(x).mean(dim=(0, 2), keepdim=True),
    "mean-dtype": lambda x: x.mean(dtype=torch.float32).double(),
    "torch.mean": lambda x: torch.mean(by_image(x), dim=[0, 1]),
    "mean-of-none": lambda x: x[:0].mean(0),
    "sum": lambda x: x.sum(),
    "sum-rows": lambda x: x.sum(dim=0, keepdim=True),
    "sum-inner-rows": lambda x: by_image(x).sum(1),
    "sum-prototypes": lambda x: by_image(x).sum(-1),
    "sum-no-dims": lambda x: x.sum(dim=()),
    "torch.sum": lambda x: torch.sum(x, dim=0),
}
OVER_ROWS: dict[str, Operation] = {
    "max": lambda x: by_image(x).max(0),
    "max-inner": lambda x: by_image(x).max(1, keepdim=True),
    "min": lambda x: x.min(dim=0),
    "amax": lambda x: by_image(x).amax((0, 1)),
    "amin-keepdim": lambda x: by_image(x).amin((0, 1), keepdim=True),
    "argmax": lambda x: x.argmax(0),
    "argmin": lambda x: torch.argmin(by_image(x), dim=1, keepdim=True),
}


def parts(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same(got: Any, expected: Any) -> None:
    assert isinstance(got, Tensor) or (got.values is got[0] and got.indices is got[1])
    assert type(got) is type(expected)
    for one, other in zip(parts(got), parts(expected), strict=True):
        assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, other.requires_grad)
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.usefixtures("_tiles")
def test_a_reduction_equals_that_of_stored_logits_with_its_gradients(subtests: pytest.Subtests) -> None:
    for name in OVER_PROTOTYPES:
        with subtests.test(name):
            logits, do = make_logits(), OVER_PROTOTYPES[name]
            got, expected = do(logits), do(logits.materialize())
            assert_same(got, expected)
            value = parts(got)[0]
            if not value.requires_grad or value.numel() == 0 or value.isnan().any():
                continue
            leaves = [logits.features, logits.prototypes.weight, logits.prototypes.magnitude]
            weights = torch.randn_like(value)
            ours = torch.autograd.grad((value * weights).sum(), leaves)
            for one, other in zip(ours, torch.autograd.grad((parts(expected)[0] * weights).sum(), leaves), strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("_tiles")
def test_an_extreme_over_rows_equals_that_of_stored_logits(subtests: pytest.Subtests) -> None:
    for name in OVER_ROWS:
        with subtests.test(name):
            logits = make_logits().detach()
            assert_same(OVER_ROWS[name](logits), OVER_ROWS[name](logits.materialize()))


def test_a_gradient_that_an_extreme_over_rows_lacks_is_not_dropped(subtests: pytest.Subtests) -> None:
    for name in [name for name in OVER_ROWS if "arg" not in name]:
        with subtests.test(name):
            with pytest.raises(
                RuntimeError, match=r"over rows, for each prototype, has no gradient here; expected .*detach\(\)"
            ):
                OVER_ROWS[name](make_logits())
            with torch.no_grad():
                OVER_ROWS[name](make_logits())


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_prototypes_are_ranked_as_stored_ones(dtype: torch.dtype, subtests: pytest.Subtests) -> None:
    """Every other prototype is a copy of the one before: the first of equals is taken."""
    for name in ["max-dim", "min-dim", "argmax", "argmin", "topk", "torch.max"]:
        with subtests.test(name):
            weight = torch.randint(-2, 3, (PROTOTYPES, DIM)).repeat_interleave(2, dim=0).to(dtype)
            logits: Any = PrototypeLogits(torch.randint(-2, 3, (ROWS, DIM)).to(dtype), linear_prototypes(weight))
            got, expected = (parts(OVER_PROTOTYPES[name](x)) for x in (logits, logits.materialize()))
            assert torch.equal(got[0], expected[0])
            if name != "topk":  # which of equals, torch leaves open
                assert torch.equal(got[-1], expected[-1])


def with_nan() -> Iterator[Any]:
    for poisoned in ("row", "prototype", "both"):
        features, weight = torch.randn(ROWS, DIM), torch.randn(PROTOTYPES, DIM)
        if poisoned != "prototype":
            features[4] = torch.nan
        if poisoned != "row":
            weight[[2, 5]] = torch.nan
        yield PrototypeLogits(features, linear_prototypes(weight))


@pytest.mark.usefixtures("_tiles")
def test_nan_is_taken_as_of_stored_logits(subtests: pytest.Subtests) -> None:
    for name in [*OVER_PROTOTYPES, *(f"rows-{name}" for name in OVER_ROWS)]:
        with subtests.test(name):
            do = OVER_ROWS[name.removeprefix("rows-")] if name.startswith("rows-") else OVER_PROTOTYPES[name]
            for logits in with_nan():
                got, expected = do(logits), do(logits.materialize())
                if "topk" in name:  # which of several NaN, torch leaves open
                    assert torch.equal(parts(got)[0].isnan(), parts(expected)[0].isnan())
                else:
                    assert_same(got, expected)


def test_ranking_of_other_logits_fails_the_comparison() -> None:
    """Negative control."""
    logits = make_logits()
    with pytest.raises(AssertionError):
        assert_same(logits[torch.arange(ROWS).flip(0)].max(dim=1), logits.materialize().max(dim=1))


def test_the_trainer_of_ibot_logs_its_accuracy() -> None:
    """Predictions of class tokens by both networks, as lines of its loop have them."""
    teacher, student = make_logits(), make_logits()
    probs1, probs2 = teacher.chunk(2), student.chunk(2)
    pred1, pred2 = probs1[0].max(dim=1)[1], probs2[1].max(dim=1)[1]
    accuracy = (pred1 == pred2).sum() / pred1.size(0)
    stored = [x.materialize().chunk(2) for x in (teacher, student)]
    expected = (stored[0][0].max(dim=1)[1] == stored[1][1].max(dim=1)[1]).sum() / 6
    assert torch.equal(accuracy, expected)


def test_logits_too_large_to_store_are_ranked_in_tiles() -> None:
    """[600, 40,960] logits would take 94 MiB."""
    features, weight = torch.randn(600, 2), torch.randn(40_960, 2)

    def log() -> Any:
        logits: Any = PrototypeLogits(features, linear_prototypes(weight))
        return logits.max(dim=1).indices, logits.topk(3), logits.mean(), logits.amax(0)

    largest = allocations_of(log).largest
    tile = 4 * reductions.TILE_ROWS * reductions.TILE_PROTOTYPES
    assert largest <= tile, f"{largest / 2**20:.1f} MiB allocated at once; a tile takes {tile / 2**20:.1f}"


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda x: x.softmax(-1), r"TeacherTargets\(logits, temperature\) stands for a detached softmax"),
        (lambda x: functional.log_softmax(x, dim=-1), r"TeacherTargets\(logits, temperature\)"),
        (lambda x: torch.isnan(x).any(), r"max\(\) and min\(\) of logits are NaN if any logit is"),
        (lambda x: x.isfinite().all(), r"max\(\) and min\(\) of logits are NaN if any logit is"),
        (lambda x: x.std(), "mean, max, min, topk and sum of logits need no stored values"),
        (lambda x: x.norm(dim=-1), "mean, max, min, topk and sum of logits need no stored values"),
        (lambda x: x.tolist(), "mean, max, min, topk and sum"),
        (lambda x: x.max(x), "max of PrototypeLogits and PrototypeLogits"),
        (lambda x: torch.max(x, torch.zeros(1)), "max of PrototypeLogits and Tensor"),
        (lambda x: x.topk(2, dim=0), "topk over dim 0 of PrototypeLogits"),
        (lambda x: torch.sum(x, 0, out=torch.empty(0)), "torch.sum on PrototypeLogits"),
    ],
)
def test_what_needs_the_values_says_what_does_instead(do: Operation, said: str) -> None:
    with pytest.raises((TypeError, AttributeError, IndexError), match=rf"{said}.*materialize\(\)"):
        do(make_logits())


@pytest.mark.parametrize("dim", [2, -3, (0, 5)])
def test_a_dim_that_is_not_there_is_refused(dim: Any) -> None:
    with pytest.raises(IndexError, match="expected one from -2 to 1"):
        make_logits().amax(dim)


def test_a_dim_named_twice_is_refused() -> None:
    with pytest.raises(RuntimeError, match="names one twice"):
        make_logits().sum((0, -2))


def test_more_than_all_prototypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="topk of 8 among 7 prototypes"):
        make_logits().topk(8)


@pytest.mark.parametrize("name", ["max", "argmax-dim", "mean", "topk"])
def test_targets_are_not_ranked(name: str) -> None:
    """Probabilities: their centre and temperature are not the logits'."""
    with pytest.raises((TypeError, AttributeError), match=r"\.materialize\(\)"):
        OVER_PROTOTYPES[name](TeacherTargets(make_logits(), 0.1))
