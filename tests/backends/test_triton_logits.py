"""The kernels for stored logits against the fp64 truth: tile edges, splits, hard values, strides, repeats, refusals.

On a machine without a GPU, Triton's interpreter runs them on the CPU. The truth is the plain path in fp64, which
``tests/ops/test_logit_cross_entropy.py`` holds against the formula.

Legend: G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is first imported
pytest.importorskip("triton")

from tests.measure import relative_error, worst_error  # noqa: E402
from tests.ops.test_logit_cross_entropy import BUDGET, STRIDES  # noqa: E402
from vmf_kernels import logit_cross_entropy  # noqa: E402
from vmf_kernels.backends.triton import launch, logits  # noqa: E402

HALF = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # interpreted, rounding is truncation
ENTROPIES = ("teacher_entropy", "student_entropy", "kl")
LEAVES = ("student_logits", "student_bias")


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of one ``logit_cross_entropy``, and the gradient that its loss gets."""

    student_logits: Tensor
    teacher_logits: Tensor
    pair_weights: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    image_weights: Tensor | None
    student_temperature: float = 0.1
    teacher_temperature: float = 0.05
    loss_gradient: float = 1.0

    def wide(self) -> Problem:
        """The same numbers in fp64."""
        tensors: dict[str, Any] = {name: t.double() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


def problem(
    images: int = 3, prototypes: int = 127, views: tuple[int, int] = (2, 3), dtype: torch.dtype = torch.float32
) -> Problem:
    """``views`` of teacher and student, everything optional given."""
    G, V = views
    return Problem(
        torch.randn(V * images, prototypes).to(DEVICE, dtype),
        torch.randn(G * images, prototypes).to(DEVICE, dtype),
        torch.rand(G, V, device=DEVICE),
        torch.randn(prototypes, device=DEVICE),
        torch.randn(prototypes, device=DEVICE),
        torch.rand(images, device=DEVICE),
    )


def outcome(given: Problem, backend: str) -> dict[str, Tensor]:
    """Loss, statistics and gradients."""
    arguments = {name: value for name, value in vars(given).items() if name != "loss_gradient"}
    leaves = {name: t.detach().requires_grad_() for name in LEAVES if (t := arguments[name]) is not None}
    loss, statistics = logit_cross_entropy(**(arguments | leaves), backend=backend)
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, given.loss_gradient))
    return {"loss": loss.detach(), **vars(statistics), **dict(zip(leaves, gradients, strict=True))}


def check(given: Problem, budget: float = BUDGET[torch.float32]) -> None:
    """Loss, usage and gradients within the budget; entropies, whose small values no path resolves, within plain fp32's."""
    got, plain, exact = outcome(given, "triton"), outcome(given, "torch"), outcome(given.wide(), "torch")
    for name in exact:
        error, allowed = relative_error(got[name], exact[name]), budget
        if name in ENTROPIES:
            allowed = 1e-6 + 2 * relative_error(plain[name], exact[name])
        elif name == "student_logits":
            allowed = max(budget, torch.finfo(given.student_logits.dtype).eps / 2)  # its own rounding
        if exact[name].norm() == 0:
            error = float(got[name].norm())
        assert error <= allowed, f"{name}: relative error {error:.2e}, budget {allowed:.2e}"


def use_tiles(monkeypatch: pytest.MonkeyPatch, prototypes: int, warps: int = 1) -> None:
    tile = logits.Tile(prototypes, warps)
    monkeypatch.setattr(logits, "TILES", {logits.MOST_TEACHER_VIEWS: logits.Tiles(tile, tile, tile)})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Grid of every kernel that has run, by name."""
    grids: dict[str, tuple[int, ...]] = {}
    original = launch.run

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        grids[kernel.__name__] = grid
        original(kernel, grid, *args, **options)

    monkeypatch.setattr(launch, "run", note)
    return grids


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize(
    ("images", "prototypes", "views", "dtype"),
    [
        (0, 127, (2, 3), torch.float32),
        (1, 1, (2, 3), torch.float32),
        (5, 1, (1, 1), torch.float32),
        (1, 127, (2, 10), torch.float32),
        (5, 127, (1, 1), torch.float32),
        (3, 1000, (2, 10), torch.float32),
        (1, 4099, (2, 3), torch.float32),
        (2, 127, (3, 2), torch.float32),
        (1, 64, (8, 2), torch.float32),
        *((*shape, dtype) for shape in ((3, 127, (2, 3)), (3, 4099, (1, 1))) for dtype in (torch.float32, *HALF)),
    ],
)
def test_loss_statistics_and_gradients_equal_the_fp64_truth(
    images: int, prototypes: int, views: tuple[int, int], dtype: torch.dtype
) -> None:
    check(problem(images, prototypes, views, dtype))


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("prototypes", [63, 64, 65, 191])
def test_splits_over_prototypes_and_images_do_not_matter(
    prototypes: int, monkeypatch: pytest.MonkeyPatch, launched: dict[str, tuple[int, ...]]
) -> None:
    use_tiles(monkeypatch, 32)
    monkeypatch.setattr(logits, "ROWS_PER_SUM", 1)
    monkeypatch.setattr(logits, "PROGRAMS_PER_MULTIPROCESSOR", 8)
    monkeypatch.setattr(logits, "MERGED_TILES", 2)  # the merge itself goes in steps
    check(problem(5, prototypes))
    tiles, groups = launched["student_tiles_kernel"]
    assert tiles == -(-prototypes // 32)
    assert groups > 1, "one group only: nothing was split"
    assert launched["gradient_kernel"] == (tiles, groups)


@pytest.mark.quick
@pytest.mark.parametrize("dropped", ["student_bias", "teacher_bias", "image_weights"])
def test_optional_arguments_may_be_left_out_and_matter(dropped: str) -> None:
    given = problem()
    nothing: dict[str, Any] = {dropped: None}
    check(replace(given, **nothing))
    seen = relative_error(outcome(replace(given, **nothing), "triton")["loss"], outcome(given.wide(), "torch")["loss"])
    assert seen > 1e-3, f"dropping {dropped} changes the loss by {seen:.2e} only"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_low_temperatures(dtype: torch.dtype) -> None:
    check(replace(problem(dtype=dtype), student_temperature=0.01, teacher_temperature=0.01))


def test_an_offset_common_to_a_row_costs_no_more_than_on_the_plain_path() -> None:
    given = problem()
    shifted = replace(given, student_logits=given.student_logits + 500, teacher_logits=given.teacher_logits + 500)
    got, plain, exact = outcome(shifted, "triton"), outcome(shifted, "torch"), outcome(shifted.wide(), "torch")
    for name in exact:
        error, allowed = (relative_error(got[name], exact[name]), 2 * relative_error(plain[name], exact[name]) + 1e-6)
        assert error <= allowed, f"{name}: relative error {error:.2e}, budget {allowed:.2e}, twice the plain path's"


@pytest.mark.parametrize("place", [0, 126])
def test_a_dominating_prototype(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 32)
    given = problem()
    given.student_logits[:, place] += 1e4
    given.teacher_logits[:, (place + 50) % 127] += 1e4
    got, exact = outcome(given, "triton"), outcome(given.wide(), "torch")
    assert got["loss"] > 1e4
    error, name = worst_error(*({n: r[n] for n in ("loss", "usage", *LEAVES)} for r in (got, exact)))
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"


@pytest.mark.parametrize("side", ["student_bias", "teacher_bias"])
def test_a_bias_of_minus_infinity_removes_a_prototype(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 32)
    given = problem(prototypes=128)
    given.teacher_bias[30:100] = float("-inf")  # type: ignore[index]  # two tiles have nothing else
    if side == "student_bias":
        given.student_bias[40:90] = float("-inf")  # type: ignore[index]  # where no teacher puts anything
    check(given)


def test_biases_that_remove_every_prototype_leave_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 64)  # what lies past the 100th prototype must not count among them
    nothing = torch.full((100,), float("-inf"), device=DEVICE)
    given = replace(problem(2, 100), student_bias=nothing, teacher_bias=nothing)
    got, exact = outcome(given, "triton"), outcome(given.wide(), "torch")
    names = ("loss", "usage", *ENTROPIES[:2])
    error, name = worst_error(*({n: r[n] for n in names} for r in (got, exact)))
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter: the lowest logit over 0.05 is -inf
@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
def test_lowest_teacher_logits_make_no_nan(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 32)
    given = problem(prototypes=100)
    given.teacher_logits[:2, 20:70] = value
    got, exact = outcome(given, "triton"), outcome(given.wide(), "torch")
    finite = [name for name in exact if exact[name].isfinite().all()]
    assert {"loss", "usage", *LEAVES} <= set(finite), "the plain path makes NaN of it"
    error, name = worst_error(*({n: r[n] for n in finite} for r in (got, exact)))
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"
    assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_a_broken_logit_breaks_the_loss(side: str) -> None:
    given = problem()
    getattr(given, side)[1, 5] = float("nan")
    got = outcome(given, "triton")
    assert got["loss"].isnan()
    assert not got["student_logits"].isfinite().all(), "a GradScaler could not see it"


@pytest.mark.parametrize("layout", ["every-second-row", "sliced-columns", "expanded-rows"])
def test_row_strides_do_not_matter(layout: str) -> None:
    given = problem()
    laid = replace(
        given,
        student_logits=STRIDES[layout](given.student_logits),
        teacher_logits=STRIDES[layout](given.teacher_logits),
        pair_weights=given.pair_weights.T.contiguous().T,
        student_bias=torch.stack([given.student_bias, given.teacher_bias], dim=1)[:, 0],  # type: ignore[list-item]
    )
    assert not laid.student_logits.is_contiguous()
    check(laid)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scaled_loss_has_the_scaled_gradient(scale: float) -> None:
    given = problem(dtype=torch.float16)
    unscaled = outcome(given.wide(), "torch")["student_logits"]
    small = 1e-7  # unscaled, most of the fp16 gradient would be 0
    given = replace(given, pair_weights=given.pair_weights * small, loss_gradient=scale)
    error = relative_error(outcome(given, "triton")["student_logits"].double() / (small * scale), unscaled)
    if scale == 1.0:
        assert error > 0.01, f"the negative control has not underflowed: relative error {error:.2e}"
    else:
        assert error <= 2e-3, f"relative error {error:.2e}, budget 2e-03"


def test_rows_may_lie_beyond_32_bit_offsets() -> None:
    stride = 2**30  # the third row starts at element 2^31; what lies between is never touched
    given = problem(1, 40, (3, 3), torch.float16)
    far = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE).as_strided((3, 40), (stride, 1))
    for side in ("student_logits", "teacher_logits"):
        laid: dict[str, Any] = {side: far.copy_(getattr(given, side))}
        check(replace(given, **laid))


def test_bfloat16_is_read_exactly_and_written_to_one_rounding() -> None:
    given = problem(2, 127, dtype=torch.bfloat16)
    got, exact = outcome(given, "triton"), outcome(given.wide(), "torch")
    rounding = torch.finfo(torch.bfloat16).eps / (2 if DEVICE == "cuda" else 1)  # the interpreter truncates
    for name in ("loss", "usage", "student_bias", "student_logits"):
        error, allowed = relative_error(got[name], exact[name]), rounding if name == "student_logits" else 1e-5
        assert error <= allowed, f"{name}: relative error {error:.2e}, budget {allowed:.2e}"


def test_a_repeat_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "ROWS_PER_SUM", 1)
    given = problem(5, 300, dtype=HALF[-1])
    first, second = outcome(given, "triton"), outcome(given, "triton")
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{different} differ"


def test_temperatures_are_read_on_the_device() -> None:
    given = problem()
    taus: dict[str, Any] = {
        "student_temperature": torch.tensor(0.1, device=DEVICE),
        "teacher_temperature": torch.tensor([0.05], dtype=torch.float64, device=DEVICE),
    }
    error, name = worst_error(outcome(replace(given, **taus), "triton"), outcome(given, "triton"))
    assert error <= 1e-6, f"{name}: relative difference {error:.2e}"


@pytest.mark.parametrize("ignored", ["p_student_bias", "p_teacher_bias", "p_pair_weights"])
def test_a_wrong_launch_exceeds_the_budget(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an argument reversed on its way into the kernels is seen."""
    original = launch.run

    def wrong(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        names = kernel.arg_names[: len(args)]
        turned = (a.flip(-1).contiguous() if name == ignored else a for name, a in zip(names, args, strict=True))
        original(kernel, grid, *turned, **options)

    given = problem()
    check(given)
    monkeypatch.setattr(launch, "run", wrong)
    with pytest.raises(AssertionError, match="loss: relative error"):
        check(given)


def test_a_lost_tile_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: prototypes that no program owns are seen."""
    use_tiles(monkeypatch, 32)
    monkeypatch.setattr(logits, "_tile_count", lambda prototypes, tile: prototypes // tile.prototypes)
    with pytest.raises(AssertionError, match="relative error"):
        check(problem())


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_same_bits() -> None:
    given = problem(5, 1000, (2, 10), torch.bfloat16)
    student = given.student_logits.requires_grad_()

    def step() -> Tensor:
        loss, _ = logit_cross_entropy(student, given.teacher_logits, given.pair_weights, backend="triton")
        return torch.autograd.grad(loss, student)[0]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on a host synchronisation
        replayed = step()
    replayed.zero_()
    graph.replay()
    assert torch.equal(replayed, expected)


@pytest.mark.parametrize("absent", [(), (1, 3, 5)], ids=["all", "none"])
def test_the_ops_are_well_formed(absent: tuple[int, ...]) -> None:
    given = problem(2, 19)
    taus = [torch.tensor(t, dtype=torch.float64, device=DEVICE) for t in (0.1, 0.05)]
    weights = (given.pair_weights, given.image_weights)
    plain = [given.student_logits, given.student_bias, given.teacher_logits, given.teacher_bias, *weights, *taus]
    tensors = [None if i in absent else x for i, x in enumerate(plain)]
    leaves = [x.clone().requires_grad_() if i < 2 and x is not None else x for i, x in enumerate(tensors)]
    torch.library.opcheck(torch.ops.vmf_kernels.logit_cross_entropy.default, (*leaves, "triton"))
    *_, student_lse, teacher_lse = torch.ops.vmf_kernels.logit_cross_entropy(*tensors, "triton")
    arguments = (*tensors, "triton", torch.ones((), device=DEVICE), student_lse, teacher_lse)
    torch.library.opcheck(torch.ops.vmf_kernels.logit_cross_entropy_backward.default, arguments)


REFUSED: list[Any] = [
    pytest.param({"student_logits": torch.randn(6, 9).double()}, "student logits are torch.float64", id="double"),
    pytest.param({"teacher_logits": torch.randn(9, 4).T}, r"teacher logits have strides \(1, 4\)", id="transposed"),
    pytest.param(
        {"teacher_logits": torch.randn(18, 9), "pair_weights": torch.ones(9, 3)}, "9 teacher views; it ta", id="views"
    ),
]


def small(change: dict[str, Tensor]) -> dict[str, Any]:
    plain = {
        "student_logits": torch.randn(6, 9),
        "teacher_logits": torch.randn(4, 9),
        "pair_weights": torch.ones(2, 3),
    }
    return {name: tensor.to(DEVICE) for name, tensor in (plain | change).items()}


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_what_the_kernels_cannot_take_is_said_or_goes_the_plain_way(change: dict[str, Tensor], reason: str) -> None:
    arguments = small(change)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run here: .*{reason}"):
        logit_cross_entropy(**arguments, backend="triton")
    assert logit_cross_entropy(**arguments).loss == logit_cross_entropy(**arguments, backend="torch").loss


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_auto_takes_the_kernels_on_cuda_only(backend: str, launched: dict[str, tuple[int, ...]]) -> None:
    logit_cross_entropy(**small({}), backend=backend)
    expected = backend == "triton" or (backend == "auto" and DEVICE == "cuda")
    assert bool(launched) == expected, f"{backend!r} launched {sorted(launched)}"


def test_the_cpu_is_refused_where_nothing_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    arguments = {name: tensor.cpu() for name, tensor in small({}).items()}
    with pytest.raises(RuntimeError, match="cannot run here: it runs on NVIDIA GPUs, but the tensors are on the CPU"):
        logit_cross_entropy(**arguments, backend="triton")
