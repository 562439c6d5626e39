"""The centres against their formulas: steps, micro-batches, starts, and batches that are not finite.

Legend: R teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.centers import log_mean_probability, moved_center
from tests.fuzz.statements.dino import exact_log_vmf_constant
from tests.measure import allocations_of, relative_error
from vmf_kernels import LogitCenter, ProbabilityCenter, PrototypeLogits, vmf_prototypes
from vmf_kernels.centering.running_mean import RunningMean

pytestmark = pytest.mark.quick

ROWS, PROTOTYPES, DIM = 70, 301, 24  # more rows than are formed at once from stored logits
TAU = 0.05
BUDGET = 1e-5  # relative, in norm; the centres are fp32
KINDS = ["logit", "log_probability", "probability"]
OUTPUTS = ["unstored", "stored"]
Batch = tuple[PrototypeLogits | Tensor, float, Tensor | None]


def make_center(kind: str, start: str = "zero", momentum: float = 0.9, prototypes: int = PROTOTYPES) -> RunningMean:
    if kind == "logit":
        return LogitCenter(prototypes, momentum, start=start)
    return ProbabilityCenter(prototypes, momentum, average=kind, start=start)


def teacher_logits(rows: int = ROWS, norm: float = 1.0) -> PrototypeLogits:
    weight = torch.randn(PROTOTYPES, DIM, generator=torch.Generator().manual_seed(1)) * (norm / DIM**0.5)
    return PrototypeLogits(functional.normalize(torch.randn(rows, DIM), dim=1), vmf_prototypes(weight))


def batch_of(logits: PrototypeLogits, output: str = "unstored") -> Batch:
    """Arguments of ``update``: the logits as they are, or stored, with the normaliser that stored logits lack."""
    if output == "unstored":
        return logits, TAU, None
    normalizer = exact_log_vmf_constant(logits.prototypes.norms().double() / TAU, DIM).float()
    return logits.materialize(), TAU, normalizer


def exact_mean(logits: PrototypeLogits, kind: str) -> Tensor:
    """[1, K] the batch's mean in the units of the centre, dense in fp64."""
    raw, normalizer = raw_and_normalizer(logits)
    return raw.mean(dim=0, keepdim=True) if kind == "logit" else log_mean_probability(raw / TAU + normalizer)


def raw_and_normalizer(logits: PrototypeLogits) -> tuple[Tensor, Tensor]:
    """[R, K] logits and [K] nats in fp64."""
    features, weight = logits.features.double(), logits.prototypes.weight.double()
    return features @ weight.T, exact_log_vmf_constant(weight.norm(dim=1) / TAU, DIM)


def exact_center(batches: list[PrototypeLogits], kind: str, momentum: float = 0.9) -> Tensor:
    """[1, K] the running mean over whole batches from the published start."""
    center = torch.full((1, PROTOTYPES), -math.log(PROTOTYPES) if kind == "probability" else 0.0, dtype=torch.float64)
    for logits in batches:
        raw, normalizer = raw_and_normalizer(logits)
        center = moved_center(center, kind, raw, raw / TAU + normalizer, momentum)
    return center


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_center_follows_its_formula(kind: str, output: str) -> None:
    batches = [teacher_logits(rows) for rows in (ROWS, 3, 1)]
    center = make_center(kind)
    for logits in batches:
        center.update(*batch_of(logits, output))
    error = relative_error(center.center, exact_center(batches, kind))
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


def test_the_two_averages_of_probabilities_differ() -> None:
    """Negative control: one's formula is not the other's."""
    batches = [teacher_logits() for _ in range(3)]
    error = relative_error(exact_center(batches, "log_probability"), exact_center(batches, "probability"))
    assert error > 100 * BUDGET, f"relative difference {error:.2e}"


def test_center_in_fp64_follows_its_formula_to_fp64() -> None:
    logits = teacher_logits()
    wide = PrototypeLogits(logits.features.double(), vmf_prototypes(logits.prototypes.weight.double()))
    for kind in KINDS:
        center = make_center(kind).double()
        center.center.copy_(exact_center([], kind))  # the start too, in fp64
        center.update(wide, TAU)
        error = relative_error(center.center, exact_center([wide], kind))
        assert error <= 1e-12, f"{kind}: relative error {error:.2e}, budget 1e-12"


def test_logit_center_is_divided_by_the_temperature_and_probability_center_is_not() -> None:
    for kind, factor in (("logit", 1 / TAU), ("log_probability", 1.0), ("probability", 1.0)):
        center = make_center(kind)
        center.update(*batch_of(teacher_logits()))
        torch.testing.assert_close(center.bias(TAU), -center.center[0] * factor)


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_zero_keeps_the_last_batch_only(kind: str) -> None:
    batches = [teacher_logits(), teacher_logits()]
    center = make_center(kind, momentum=0.0)
    for logits in batches:
        center.update(*batch_of(logits))
    error = relative_error(center.center, exact_mean(batches[-1], kind))
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["log_probability", "probability"])
def test_probability_center_is_finite_where_probabilities_underflow(kind: str, output: str) -> None:
    logits = teacher_logits(norm=15.0)
    stored, _, normalizer = batch_of(logits, "stored")
    assert isinstance(stored, Tensor)
    assert normalizer is not None
    naive = (stored / TAU + normalizer).softmax(dim=1).mean(dim=0).log()
    center = make_center(kind, momentum=0.5)
    center.update(*batch_of(logits, output))
    error = relative_error(center.center, exact_center([logits], kind, 0.5))
    assert naive.isneginf().any(), "the negative control has not underflowed"
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_equal_one_big_batch(kind: str, output: str) -> None:
    logits = teacher_logits()
    whole, parts = make_center(kind), make_center(kind)
    whole.update(*batch_of(logits, output))
    for rows in (slice(0, 5), slice(5, 5), slice(5, 67), slice(67, ROWS)):
        parts.accumulate(*batch_of(logits[rows], output))
        assert parts.center.equal(make_center(kind).center), "accumulate moved the centre"
    parts.apply_pending()
    error = relative_error(parts.center, whole.center)
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


def test_update_per_micro_batch_is_not_one_big_batch() -> None:
    """Negative control: moving with every micro-batch, as the published code does, is another centre."""
    logits = teacher_logits()
    whole, parts = make_center("logit"), make_center("logit")
    whole.update(*batch_of(logits))
    for rows in (slice(0, 5), slice(5, ROWS)):
        parts.update(*batch_of(logits[rows]))
    error = relative_error(parts.center, whole.center)
    assert error > 100 * BUDGET, f"relative difference {error:.2e}"


def test_apply_pending_without_a_batch_changes_nothing() -> None:
    center = make_center("logit")
    center.update(*batch_of(teacher_logits()))
    before = center.center.clone()
    center.apply_pending()
    assert torch.equal(center.center, before)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_leaves_the_center(kind: str, output: str, value: float) -> None:
    center, good = make_center(kind), teacher_logits()
    center.update(*batch_of(good, output))
    before = center.center.clone()
    bad = teacher_logits()
    bad.features[4, 2] = value
    center.update(*batch_of(bad, output))
    assert torch.equal(center.center, before)
    center.update(*batch_of(good, output))
    assert not torch.equal(center.center, before), "the next good batch did not move the centre"
    assert center.center.isfinite().all()


@pytest.mark.parametrize("bad_at", [0, 1, 2])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("start", ["zero", "first_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_micro_batch_counts_as_none(kind: str, start: str, output: str, bad_at: int) -> None:
    with_it, without, bad = make_center(kind, start), make_center(kind, start), teacher_logits()
    bad.features[4, 2] = math.nan
    good = [teacher_logits(rows) for rows in (ROWS, 3)]
    for logits in (*good[:bad_at], bad, *good[bad_at:]):
        with_it.accumulate(*batch_of(logits, output))
    for logits in good:
        without.accumulate(*batch_of(logits, output))
    for center in (with_it, without):
        center.apply_pending()
    assert with_it.center.isfinite().all()
    assert torch.equal(with_it.center, without.center)
    assert not torch.equal(without.center, make_center(kind, start).center), "the good batches did not move the centre"


def test_a_batch_that_overflows_the_sum_counts_as_none() -> None:
    """Its own mean is finite."""
    center = LogitCenter(5, momentum=0.0)
    center.accumulate(torch.full((1, 5), 2e38), TAU)
    center.accumulate(torch.full((1, 5), 3e38), TAU)
    center.apply_pending()
    assert center.center.eq(2e38).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stored_logits_of_any_number_of_dims_are_rows(kind: str) -> None:
    rows = teacher_logits(12).materialize()
    shapes = [(12, PROTOTYPES), (3, 4, PROTOTYPES), (1, 12, 1, PROTOTYPES)]
    centers = [make_center(kind, "first_batch") for _ in shapes]
    for center, shape in zip(centers, shapes, strict=True):
        center.begin(rows.view(shape), TAU)
        center.update(rows.view(shape), TAU)
    assert centers[0].center.isfinite().all()
    assert all(torch.equal(center.center, centers[0].center) for center in centers)


@pytest.mark.parametrize("kind", KINDS)
def test_center_stays_fp32_in_a_short_module(kind: str) -> None:
    plain, batches = make_center(kind), [teacher_logits() for _ in range(3)]
    plain.update(*batch_of(batches[0]))
    shorts = [copy.deepcopy(plain) for _ in range(3)]
    for center, cast in zip(shorts, ("half", "bfloat16", "to"), strict=True):
        getattr(torch.nn.Sequential(center), cast)(*[torch.bfloat16] * (cast == "to"))
    for center in (plain, *shorts):
        for logits in batches[1:]:
            center.update(*batch_of(logits))
        assert center.center.dtype == torch.float32
        assert torch.equal(center.center, plain.center)
    assert plain.double().center.dtype == torch.float64
    assert plain.half().to("meta").center.is_meta


@pytest.mark.parametrize("start", ["zero", "first_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_center_without_memory_starts_by_reset_parameters(kind: str, start: str) -> None:
    with torch.device("meta"):
        center = make_center(kind, start)
    center.to_empty(device="cpu")
    center.center.fill_(7.0)  # what to_empty leaves is anything
    center.reset_parameters()
    made, logits = make_center(kind, start), teacher_logits()
    torch.testing.assert_close(center.center, made.center, rtol=0, atol=0, equal_nan=True)
    for each in (center, made):
        each.begin(*batch_of(logits))
        each.update(*batch_of(logits))
    assert torch.equal(center.center, made.center)


def test_reset_parameters_drops_what_waits() -> None:
    center = make_center("logit")
    center.update(*batch_of(teacher_logits()))
    center.accumulate(*batch_of(teacher_logits()))
    center.reset_parameters()
    center.apply_pending()
    assert center.center.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_leave_the_center(kind: str) -> None:
    center = make_center(kind)
    before = center.center.clone()
    for output in OUTPUTS:
        center.update(*batch_of(teacher_logits(0), output))
    assert torch.equal(center.center, before)


@pytest.mark.parametrize("begin", [True, False], ids=["begin", "update-alone"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_start_first_batch_is_at_its_mean(kind: str, output: str, begin: bool) -> None:
    center, logits = make_center(kind, "first_batch"), teacher_logits()
    assert center.center.isnan().all()
    if begin:
        center.begin(*batch_of(logits, output))
    center.update(*batch_of(logits, output))  # of a mean with itself
    error = relative_error(center.center, exact_mean(logits, kind))
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


def test_begin_does_nothing_to_a_started_center() -> None:
    for start in ("zero", "first_batch"):
        center = make_center("logit", start)
        center.update(*batch_of(teacher_logits()))
        before = center.center.clone()
        center.begin(*batch_of(teacher_logits()))
        assert torch.equal(center.center, before), start


@pytest.mark.parametrize("kind", KINDS)
def test_start_first_batch_waits_for_a_finite_one(kind: str) -> None:
    center, bad, good = make_center(kind, "first_batch"), teacher_logits(), teacher_logits()
    bad.features[0, 0] = math.nan
    for logits in (bad, good):
        center.begin(*batch_of(logits))
        center.update(*batch_of(logits))
    error = relative_error(center.center, exact_mean(good, kind))
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("start", ["zero", "first_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_holds_the_center_and_goes_on_from_it(kind: str, start: str) -> None:
    first, second = teacher_logits(), teacher_logits()
    straight, resumed = make_center(kind, start), make_center(kind, start)
    straight.begin(*batch_of(first))
    straight.update(*batch_of(first))
    resumed.load_state_dict(straight.state_dict())
    for center in (straight, resumed):
        center.begin(*batch_of(second))
        center.update(*batch_of(second))
    assert list(straight.state_dict()) == ["center"]
    assert torch.equal(resumed.center, straight.center)


def test_a_loaded_center_that_has_not_started_still_starts() -> None:
    center, logits = make_center("logit", "first_batch"), teacher_logits()
    center.begin(*batch_of(teacher_logits()))
    center.load_state_dict(make_center("logit", "first_batch").state_dict())
    center.begin(*batch_of(logits))
    error = relative_error(center.center, exact_mean(logits, "logit"))
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


def test_loading_drops_what_was_accumulated() -> None:
    center = make_center("logit")
    center.accumulate(*batch_of(teacher_logits()))
    center.load_state_dict(center.state_dict())
    center.apply_pending()
    assert center.center.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_round_the_center(kind: str, output: str, dtype: torch.dtype) -> None:
    batch = batch_of(teacher_logits(), output)
    plain, cast = make_center(kind), make_center(kind)
    plain.update(*batch)
    with torch.autocast("cpu", dtype=dtype):
        cast.update(*batch)
    assert torch.equal(cast.center, plain.center), f"relative error {relative_error(cast.center, plain.center):.2e}"


def test_the_center_takes_no_gradient_graph_along() -> None:
    weight = torch.randn(PROTOTYPES, DIM, requires_grad=True)
    logits = PrototypeLogits(torch.randn(6, DIM, requires_grad=True), vmf_prototypes(weight))
    for kind, start in itertools.product(KINDS, ("zero", "first_batch")):
        center = make_center(kind, start)
        for teacher in (logits, logits.materialize()):
            center.begin(teacher, TAU)
            center.update(teacher, TAU)
        assert not center.center.requires_grad, kind


def test_logit_center_forms_no_logits() -> None:
    prototypes = 2**16
    logits = PrototypeLogits(torch.randn(1024, 8), vmf_prototypes(torch.randn(prototypes, 8)))
    center = LogitCenter(prototypes)
    used = allocations_of(lambda: center.update(logits, TAU)).peak
    assert used < 8 * 4 * prototypes, f"{used / 2**20:.1f} MiB; the logits take {logits.shape.numel() / 2**18:.0f} MiB"


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_arguments_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"center momentum is -0.1; expected a number in \[0, 1\)"):
        make_center(kind, momentum=-0.1)
    with pytest.raises(ValueError, match="start is 'one'; expected one of zero, first_batch"):
        make_center(kind, "one")
    with pytest.raises(ValueError, match=f"teacher has {PROTOTYPES} prototypes; expected the center's 7"):
        make_center(kind, prototypes=7).update(*batch_of(teacher_logits()))


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(ValueError, match="average is 'mean'; expected one of log_probability, probability"):
        ProbabilityCenter(3, average="mean")


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    logits = teacher_logits()
    with pytest.raises(ValueError, match=r"teacher_temperature is 0.0; expected a number > 0"):
        LogitCenter(PROTOTYPES).bias(0.0)
    for teacher in (logits, logits.materialize()):
        with pytest.raises(ValueError, match=r"temperature is -1.0; expected a number > 0"):
            ProbabilityCenter(PROTOTYPES).update(teacher, -1.0)


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=f"bias has 2 elements; expected one for each of the {PROTOTYPES} prototypes"):
        ProbabilityCenter(PROTOTYPES).update(teacher_logits().materialize(), TAU, torch.zeros(2))
