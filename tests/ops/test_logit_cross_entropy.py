"""The fused pass over stored logits against the formula: strides, dtypes, chunks, gradients, memory, tracing.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.cross_entropy import plain_loss
from tests.measure import allocations_of, relative_error, worst_error
from vmf_kernels import CrossEntropy, PrototypeLogits, linear_prototypes, logit_cross_entropy, prototype_cross_entropy
from vmf_kernels.backends.stored import streaming

pytestmark = pytest.mark.quick

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, in norm
STUDENT_TAU, TEACHER_TAU = 0.1, 0.05
GRADIENTS = ("student_logits", "student_bias")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of one ``logit_cross_entropy``."""

    student_logits: Tensor
    teacher_logits: Tensor
    pair_weights: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    image_weights: Tensor | None = None


def problem(images: int = 5, prototypes: int = 301, dtype: torch.dtype = torch.float64) -> Problem:
    """Two teacher and four student views, everything optional given."""
    logits = torch.randn(6 * images, prototypes, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        logits[: 4 * images].clone().requires_grad_(),
        logits[4 * images :],
        torch.rand(2, 4, dtype=wide),
        torch.randn(prototypes, dtype=wide).requires_grad_(),
        torch.randn(prototypes, dtype=wide),
        torch.rand(images, dtype=wide),
    )


def loss_of(given: Problem) -> CrossEntropy:
    return logit_cross_entropy(
        given.student_logits,
        given.teacher_logits,
        given.pair_weights,
        student_temperature=STUDENT_TAU,
        teacher_temperature=TEACHER_TAU,
        student_bias=given.student_bias,
        teacher_bias=given.teacher_bias,
        image_weights=given.image_weights,
    )


def dense_loss(given: Problem) -> Tensor:
    """The formula in the dtype of the weights."""
    dtype = given.pair_weights.dtype
    l_s, l_t = given.student_logits.to(dtype) / STUDENT_TAU, given.teacher_logits.to(dtype) / TEACHER_TAU
    l_s = l_s if given.student_bias is None else l_s + given.student_bias
    q = (l_t if given.teacher_bias is None else l_t + given.teacher_bias).softmax(dim=1)
    return plain_loss(l_s, q, given.pair_weights, given.image_weights)


def outcome(given: Problem, compute: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
    """Loss and gradients, the leaves taken anew."""
    leaves = {
        name: tensor.detach().requires_grad_() for name in GRADIENTS if (tensor := getattr(given, name)) is not None
    }
    loss = compute(replace(given, **leaves))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact_outcome(given: Problem) -> dict[str, Tensor]:
    """The formula in fp64 on the numbers as they are rounded."""
    wide = {name: None if t is None else t.detach().double() for name, t in vars(given).items()}
    return outcome(Problem(**wide), dense_loss)  # type: ignore[arg-type]


def measured(given: Problem) -> dict[str, Tensor]:
    return outcome(given, lambda p: loss_of(p).loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prototypes", [1, 301, 4099])
@pytest.mark.parametrize("images", [1, 5])
def test_loss_and_gradients_equal_the_formula(images: int, prototypes: int, dtype: torch.dtype) -> None:
    given = problem(images, prototypes, dtype)
    if prototypes == 1:  # nothing to learn: the gradient is 0 and has no relative error
        assert measured(given)["student_logits"].abs().max() <= BUDGET[dtype]
        return
    error, name = worst_error(measured(given), exact_outcome(given))
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize("dropped", ["student_bias", "teacher_bias", "image_weights"])
def test_optional_arguments_may_be_left_out_and_matter(dropped: str) -> None:
    given = problem()
    nothing: dict[str, Any] = {dropped: None}
    without = replace(given, **nothing)
    error, name = worst_error(measured(without), exact_outcome(without))
    seen = relative_error(measured(without)["loss"], exact_outcome(given)["loss"])
    assert error <= 1e-10, f"{name}: relative error {error:.2e}, budget 1e-10"
    assert seen > 1e-3, f"dropping {dropped} changes the loss by {seen:.2e} only"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_the_loss_to_fp32_and_the_gradient_to_one_rounding(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype)
    got, exact = measured(given), exact_outcome(given)
    loss, gradient = (relative_error(got[name], exact[name]) for name in ("loss", "student_logits"))
    assert (got["loss"].dtype, got["student_logits"].dtype, got["student_bias"].dtype) == (
        torch.float32,
        dtype,
        torch.float32,
    )
    assert loss <= 1e-5, f"loss: relative error {loss:.2e}, budget 1e-05"
    budget = torch.finfo(dtype).eps / 2
    assert gradient <= budget, f"gradient: relative error {gradient:.2e}, budget {budget:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_has_the_dtype_and_shape_of_the_logits(dtype: torch.dtype) -> None:
    gradient = measured(problem(dtype=dtype))["student_logits"]
    assert (gradient.dtype, gradient.shape) == (dtype, (20, 301))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every-second-row": lambda x: torch.stack([x, x + 9], dim=1).flatten(0, 1)[::2],
    "sliced-columns": lambda x: functional.pad(x, (3, 5), value=7.0)[:, 3:-5],
    "every-second-column": lambda x: torch.stack([x, x + 9], dim=2).flatten(1)[:, ::2],
    "expanded-rows": lambda x: x[:1].expand(x.shape[0], -1),
    "expanded-columns": lambda x: x[:, :1].expand(-1, x.shape[1]),
}


@pytest.mark.parametrize("chunk_bytes", [1, 2**23], ids=["image-by-image", "one-chunk"])
@pytest.mark.parametrize("layout", STRIDES)
def test_strides_do_not_matter(layout: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_BYTES", chunk_bytes)
    given = problem()
    laid = [STRIDES[layout](x.detach()) for x in (given.student_logits, given.teacher_logits)]
    student, plain = laid[0].detach().requires_grad_(), laid[0].contiguous().requires_grad_()
    results = []
    for s, t in ((student, laid[1]), (plain, laid[1].contiguous())):
        loss = loss_of(replace(given, student_logits=s, teacher_logits=t)).loss
        results.append({"loss": loss, "gradient": torch.autograd.grad(loss, s)[0]})
    assert not student.is_contiguous()
    error, name = worst_error(*results)
    assert error <= 1e-13, f"{name}: relative error {error:.2e}, budget 1e-13"


@pytest.mark.parametrize("chunk_bytes", [1, 6 * 301 * 8 * 2, 6 * 301 * 8 * 4])
def test_chunks_do_not_matter(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    whole = measured(given)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", chunk_bytes)
    error, name = worst_error(measured(given), whole)
    assert error <= 1e-13, f"{name}: relative error {error:.2e}, budget 1e-13"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_offset_common_to_a_row_does_not_matter(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype)
    shifted = replace(given, student_logits=given.student_logits + 500, teacher_logits=given.teacher_logits + 500)
    got, exact = measured(shifted), exact_outcome(shifted)
    plain = outcome(shifted, dense_loss)
    for name in exact:
        error, allowed = relative_error(got[name], exact[name]), 2 * relative_error(plain[name], exact[name]) + 1e-12
        assert error <= allowed, f"{name}: relative error {error:.2e}, budget {allowed:.2e}, twice the dense formula's"


def test_dominating_logits_give_a_finite_loss_and_gradient() -> None:
    given = problem(dtype=torch.float32)
    student = torch.zeros(20, 301)
    student[:, 7] = 1e4
    teacher = torch.zeros(10, 301)
    teacher[:, 8] = 1e4
    got = measured(replace(given, student_logits=student, teacher_logits=teacher))
    assert got["loss"] > 1e4
    assert all(t.isfinite().all() for t in got.values())


def test_gradient_is_that_of_finite_differences() -> None:
    given = problem(2, 9)

    def loss(student: Tensor, bias: Tensor) -> Tensor:
        return loss_of(replace(given, student_logits=student, student_bias=bias)).loss

    assert given.student_bias is not None
    assert torch.autograd.gradcheck(loss, (given.student_logits, given.student_bias), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", GRADIENTS)
def test_either_gradient_is_formed_without_the_other(frozen: str) -> None:
    given = problem()
    full = measured(given)
    (wanted,) = set(GRADIENTS) - {frozen}
    given = replace(given, **{frozen: getattr(given, frozen).detach()})
    (gradient,) = torch.autograd.grad(loss_of(given).loss, getattr(given, wanted))
    torch.testing.assert_close(gradient, full[wanted], rtol=0, atol=0)


def test_the_teacher_gets_no_gradient() -> None:
    given = problem()
    given.teacher_logits.requires_grad_()
    loss_of(given).loss.backward()
    assert given.teacher_logits.grad is None


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scaled_loss_has_the_scaled_gradient(scale: float) -> None:
    given = problem(dtype=torch.float16)
    unscaled = exact_outcome(given)["student_logits"]
    small = 1e-7  # unscaled, most of the fp16 gradient would be 0
    given = replace(given, pair_weights=given.pair_weights * small)
    (gradient,) = torch.autograd.grad(loss_of(given).loss * scale, given.student_logits)
    error = relative_error(gradient.double() / (small * scale), unscaled)
    if scale == 1.0:
        assert error > 0.01, f"the negative control has not underflowed: relative error {error:.2e}"
    else:
        assert error <= 2e-3, f"relative error {error:.2e}, budget 2e-03"


def test_backward_twice_with_retain_graph_gives_the_same() -> None:
    given = problem()
    loss = loss_of(given).loss
    first = torch.autograd.grad(loss, given.student_logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, given.student_logits)[0], first)


def test_differentiating_twice_is_refused() -> None:
    given = problem()
    (gradient,) = torch.autograd.grad(loss_of(given).loss, given.student_logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logit_cross_entropy cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), given.student_logits)


def test_statistics_equal_those_of_unstored_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(20, 8, dtype=torch.float64), torch.randn(10, 8, dtype=torch.float64)
    prototypes = linear_prototypes(torch.randn(301, 8, dtype=torch.float64))
    weights, bias, images = torch.rand(2, 4).double(), torch.randn(301).double(), torch.rand(5).double()
    options: dict[str, Any] = {"teacher_bias": bias, "image_weights": images}
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 6 * 301 * 8 * 2)  # two images at once
    streamed = prototype_cross_entropy(student, prototypes, teacher, prototypes, weights, **options)
    stored = (PrototypeLogits(x, prototypes).materialize() for x in (student, teacher))
    dense = logit_cross_entropy(next(stored), next(stored), weights, **options)
    results = [{"loss": r.loss, **vars(r.statistics)} for r in (dense, streamed)]
    error, name = worst_error(*results)
    assert error <= 1e-10, f"{name}: relative error {error:.2e}, budget 1e-10"


def test_no_images_give_no_loss_and_an_empty_gradient() -> None:
    given = problem(0)
    loss, statistics = loss_of(given)
    loss.backward()
    assert loss == 0
    assert given.student_logits.grad is not None
    assert given.student_logits.grad.shape == (0, 301)
    assert statistics.usage.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round(dtype: torch.dtype) -> None:
    given = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        cast = measured(given)
    error, name = worst_error(cast, measured(given))
    assert error == 0, f"{name}: relative difference {error:.2e}"


@pytest.mark.thorough
def test_nothing_of_the_logits_size_is_allocated_but_the_gradient() -> None:
    given = problem(images=96, prototypes=16384, dtype=torch.float32)  # 24 MiB for the student, 12 for the teacher
    size = given.student_logits.nbytes

    def step() -> Tensor:
        return torch.autograd.grad(loss_of(given).loss, given.student_logits)[0]

    used, forward = allocations_of(step), allocations_of(lambda: loss_of(given))
    assert used.largest == size, f"largest allocation {used.largest / size:.2f} of the logits; expected the gradient"
    allowed = 5 * streaming.CHUNK_BYTES
    assert forward.peak <= allowed, f"forward peak {forward.peak / 2**20:.1f} MiB, budget {allowed / 2**20:.1f}"
    assert used.peak <= size + allowed, f"peak {used.peak / 2**20:.1f} MiB, budget {(size + allowed) / 2**20:.1f}"


@pytest.mark.thorough
def test_the_formula_allocates_more() -> None:
    """Negative control of the measurement: the dense formula's softmaxes are seen."""
    given = problem(images=96, prototypes=16384, dtype=torch.float32)
    peak = allocations_of(lambda: outcome(given, dense_loss)).peak
    assert peak > 3 * given.student_logits.nbytes, f"peak {peak / 2**20:.1f} MiB"


@pytest.fixture
def op_arguments() -> tuple[Any, ...]:
    given = problem(3, 19)
    temperatures = (torch.tensor(t, dtype=torch.float64) for t in (STUDENT_TAU, TEACHER_TAU))
    return (
        *(given.student_logits, given.student_bias, given.teacher_logits, given.teacher_bias),
        *(given.pair_weights, given.image_weights),
        *temperatures,
    )


@pytest.mark.thorough
def test_forward_op_is_a_well_formed_custom_op(op_arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.vmf_kernels.logit_cross_entropy.default, op_arguments)
    without = [None if i in (1, 3, 5) else x for i, x in enumerate(op_arguments)]
    torch.library.opcheck(torch.ops.vmf_kernels.logit_cross_entropy.default, tuple(without))


@pytest.mark.thorough
def test_backward_op_is_a_well_formed_custom_op(op_arguments: tuple[Any, ...]) -> None:
    tensors = [x.detach() for x in op_arguments]
    *_, student_lse, teacher_lse = torch.ops.vmf_kernels.logit_cross_entropy(*tensors)
    arguments = (*tensors, "auto", torch.ones((), dtype=torch.float64), student_lse, teacher_lse)
    torch.library.opcheck(torch.ops.vmf_kernels.logit_cross_entropy_backward.default, arguments)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_it_compiles_into_one_graph(layout: str) -> None:
    given = problem(dtype=torch.float32)
    if layout == "transposed":
        student = STRIDES["transposed"](given.student_logits.detach()).requires_grad_()
        given = replace(given, student_logits=student, teacher_logits=STRIDES["transposed"](given.teacher_logits))
    torch.compiler.reset()
    compiled = torch.compile(lambda p: loss_of(p).loss, fullgraph=True, backend="aot_eager")
    loss = compiled(given)
    gradient = torch.autograd.grad(loss, given.student_logits)[0]
    expected = measured(given)
    error, name = worst_error(
        {"loss": loss, "gradient": gradient}, {"loss": expected["loss"], "gradient": expected["student_logits"]}
    )
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"


WRONG: list[Any] = [
    pytest.param({"student_logits": torch.randn(4)}, r"student logits are torch.float32 of shape \(4,\)", id="vector"),
    pytest.param(
        {"teacher_logits": torch.ones(4, 9, dtype=torch.int64)}, "teacher logits are torch.int64", id="integers"
    ),
    pytest.param(
        {"teacher_logits": torch.randn(4, 8)}, "have 9 columns but teacher logits 8; both networks", id="columns"
    ),
    pytest.param(
        {"teacher_logits": torch.randn(4, 9, device="meta")}, "on cpu but teacher logits on meta", id="device"
    ),
    pytest.param({"student_bias": torch.zeros(3)}, "student_bias has 3 elements; expected one for each", id="student"),
    pytest.param({"teacher_bias": torch.zeros(3)}, "teacher_bias has 3 elements; expected one for each", id="teacher"),
    pytest.param({"pair_weights": torch.ones(2)}, r"pair weights have shape \(2,\); expected \[teacher", id="pairs"),
    pytest.param({"pair_weights": torch.ones(3, 4)}, "teacher has 4 rows, not divisible by its 3 views", id="views"),
    pytest.param({"pair_weights": torch.ones(2, 8)}, "expected the same number of images, got 2 and 1", id="images"),
    pytest.param({"image_weights": torch.ones(3)}, r"row weights have shape \(3,\); expected \[2\]", id="weights"),
    pytest.param({"student_temperature": 0.0}, "student_temperature is 0.0; expected a number > 0", id="student-tau"),
    pytest.param({"teacher_temperature": torch.tensor(-1.0)}, "teacher_temperature is -1.0", id="teacher-tau"),
    pytest.param({"teacher_temperature": torch.ones(2)}, "teacher_temperature has 2 elements", id="taus"),
    pytest.param(
        {"backend": "numpy"},
        "backend 'numpy' has no pass over stored logits; expected one of auto, streaming,",
        id="backend",
    ),
    pytest.param({"backend": "native"}, "backend 'native' has no pass over stored logits", id="unstored-backend"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "student_logits": torch.randn(8, 9),
        "teacher_logits": torch.randn(4, 9),
        "pair_weights": torch.ones(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        logit_cross_entropy(**(arguments | change))
