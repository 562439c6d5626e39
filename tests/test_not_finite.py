"""NaN in, NaN out: as with stored logits, one non-finite number makes the loss non-finite; nothing raises or waits.

Legend: R rows of either network, K prototypes, D embedding dim.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.backends.native_calls import HERE
from tests.fuzz.statements.cross_entropy import plain_loss
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    PrototypeLogits,
    linear_prototypes,
    logit_cross_entropy,
    prototype_usage,
    weight_norm_prototypes,
)
from vmf_kernels.backends.native import module
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.testing import Problem, dense_outcome, library_outcome, random_problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter

BACKENDS = ["reference", "streaming", *(f"native {isa}" for isa in HERE), "triton"]
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PLACES = {
    "student row": lambda problem: problem.student_features,
    "teacher row": lambda problem: problem.teacher_features,
    "student prototype": lambda problem: problem.student_prototypes.weight,
    "teacher prototype": lambda problem: problem.teacher_prototypes.weight,
    "student magnitude": lambda problem: problem.student_prototypes.magnitude,
    "teacher magnitude": lambda problem: problem.teacher_prototypes.magnitude,
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name, the native one's for each instruction set of the machine."""
    name, _, isa = request.param.partition(" ")
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here: tests/gpu")
    if name == "native":
        present = module.instruction_sets()
        monkeypatch.setattr(module, "instruction_sets", lambda: present[: present.index(isa) + 1])
    assert isinstance(name, str)
    return name


def spoilt(place: str, value: float, kind: str) -> Problem:
    """A problem with one number, in its fourth row or prototype, that is not finite."""
    problem = random_problem(images=3, views=(2, 3), prototypes=33, dim=16, kind=kind).to(torch.float32)
    PLACES[place](problem).view(-1, 1 if "magnitude" in place else 16)[3, 0] = value
    return problem


@pytest.mark.parametrize("kind", ["linear_vmf", "weight_norm"])
@pytest.mark.parametrize("value", VALUES)
def test_the_loss_is_not_finite_where_the_dense_one_is_not(value: str, kind: str, backend: str) -> None:
    if backend == "triton" and (value, kind) != ("nan", "weight_norm"):
        pytest.skip("interpreted, which takes long: for one of them")
    for place in PLACES:
        if "magnitude" in place and kind == "linear_vmf":
            continue
        problem = spoilt(place, VALUES[value], kind)
        dense, got = dense_outcome(problem), library_outcome(problem, backend)
        assert not dense["loss"].isfinite(), "the dense loss is finite"
        assert got["loss"].isnan(), f"{place}: the loss is {got['loss'].item()}, of stored logits NaN"
        lost = [name for name, plain in dense.items() if got[name].isfinite().all() and not plain.isfinite().all()]
        assert not lost, f"{place}: {lost} are finite"
        # what is left of the usage is right, or says that it is not
        both = dense["usage"].isfinite() & got["usage"].isfinite()
        assert torch.allclose(got["usage"][both], dense["usage"][both], atol=1e-6), f"{place}: garbage in the usage"


def test_usage_and_log_sums_are_nan_where_the_dense_ones_are(backend: str) -> None:
    for place in ("student row", "student prototype"):
        problem = spoilt(place, math.nan, "linear")
        features, prototypes = problem.student_features, problem.student_prototypes
        logits = features @ prototypes.weight.T / 0.1
        offset = features.new_zeros(len(features))
        for got, dense in (
            (prototype_usage(features, prototypes, 0.1, backend=backend), logits.softmax(dim=1).mean(dim=0)),
            (row_log_sum_exp(features, prototypes, 0.1, backend=backend), logits.logsumexp(dim=1)),
            (column_log_sum_exp(features, prototypes, 0.1, offset, backend=backend), logits.logsumexp(dim=0)),
        ):
            assert torch.equal(got.isnan(), dense.isnan()), (
                f"{place}: {got.isnan().sum()} NaN, {dense.isnan().sum()} densely"
            )
            assert torch.allclose(got, dense, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_stored_logits_do_the_same(side: str, value: str, backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here: tests/gpu")
    student, teacher = torch.randn(6, 20), torch.randn(4, 20)
    (student if side == "student" else teacher)[3, 5] = VALUES[value]
    student.requires_grad_()
    dense = plain_loss(student / 0.1, (teacher / 0.04).softmax(dim=1), torch.ones(2, 3))
    loss = logit_cross_entropy(student, teacher, torch.ones(2, 3), backend=backend).loss
    if backend == "triton" and (side, value) == ("student", "-inf"):
        # its kernels read -inf as the lowest number they use: the loss is absurd, not inf
        assert loss > 1e10 * dense.nan_to_num(posinf=1.0)
        return
    assert loss.isfinite() == dense.isfinite(), f"{loss.item()}, plainly {dense.item()}"
    assert loss.isnan() or not dense.isnan()
    if dense.isfinite():  # a teacher's logit of -inf has a probability of 0
        assert torch.allclose(loss, dense, rtol=1e-5)


def head_outputs(spoil: str) -> tuple[PrototypeLogits, PrototypeLogits]:
    """Both networks' unstored logits, one number of the teacher's NaN."""
    stored = {"features": torch.randn(6, 8), "magnitude": torch.ones(30, 1), "weight": torch.randn(30, 8)}
    if spoil != "nothing":
        stored[spoil][2, 0] = torch.nan
    student = PrototypeLogits(torch.randn(9, 8), weight_norm_prototypes(torch.ones(30, 1), torch.randn(30, 8)))
    return student, PrototypeLogits(stored["features"], weight_norm_prototypes(stored["magnitude"], stored["weight"]))


@pytest.mark.parametrize("stored", [False, True], ids=["unstored", "stored"])
@pytest.mark.parametrize("spoil", ["features", "magnitude", "weight"])
@pytest.mark.parametrize("make", [DINOLoss, DINOvMFLoss])
def test_a_centre_takes_no_part_of_such_a_batch(make: type[DINOLoss], spoil: str, stored: bool) -> None:
    loss = make(30, 3, 0.04, 0.04, 0, 1)

    def step(spoil: str) -> Tensor:
        outputs = head_outputs(spoil)
        named = {}
        if stored and make is DINOvMFLoss:
            named = dict(
                zip(("student_prototypes", "teacher_prototypes"), (x.prototypes for x in outputs), strict=True)
            )
        value: Tensor = loss(*((x.materialize() for x in outputs) if stored else outputs), 0, **named)
        return value

    step("nothing")
    before = loss.center.clone()
    assert step(spoil).isnan()
    assert torch.equal(loss.center, before), "the centre moved"
    assert step("nothing").isfinite()
    assert not torch.equal(loss.center, before), "the centre stopped"


def test_a_nan_prototype_raises_nothing_in_a_compiled_step() -> None:
    weight = torch.randn(30, 8)
    weight[2] = torch.nan

    def usage(features: Tensor) -> Tensor:
        return prototype_usage(features, linear_prototypes(weight), 0.1)

    assert torch.compile(usage, backend="aot_eager", fullgraph=True)(torch.randn(4, 8)).isnan().all()
