"""torch's default dtype and device do not affect the library's memory: results have the same bits."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vmf_kernels
from vmf_kernels import (
    DINOHead,
    DINOLoss,
    DINOvMFLoss,
    IBOTLoss,
    KoLeoLoss,
    PrototypeKoLeoLoss,
    prototype_usage,
    unique_prototypes,
)
from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.scores import NativeKeys, score_task
from vmf_kernels.compat import dinov2, dinov3, ibot, lightly, solo
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp

SOURCES = sorted(Path(vmf_kernels.__file__).parent.rglob("*.py"))
MADE = {"empty", "zeros", "ones", "full", "tensor", "arange", "linspace", "eye", "rand", "randn", "empty_strided"}
K, D, IN, VIEWS, IMAGES = 301, 16, 6, 4, 3


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "meta for all": lambda: default_device("meta"),
}


def unnamed_allocations(source: str) -> list[str]:
    """Calls of torch's functions that make tensors without a dtype and a device of their own."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        of = call.func.value
        if call.func.attr in MADE and isinstance(of, ast.Name) and of.id == "torch":
            named = {keyword.arg for keyword in call.keywords}
            if not {"dtype", "device"} <= named:
                found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_every_allocation_names_its_dtype_and_device(subtests: pytest.Subtests) -> None:
    for path in SOURCES:
        with subtests.test(path.name):
            assert not unnamed_allocations(path.read_text())


def test_an_allocation_without_a_dtype_is_found() -> None:
    """Negative control."""
    assert unnamed_allocations("x = torch.empty(3, device=y.device)\ny = torch.ones(2, dtype=torch.int64)") == [
        "line 1: torch.empty(3, device=y.device)",
        "line 2: torch.ones(2, dtype=torch.int64)",
    ]


def head(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = make()
    return student, copy.deepcopy(student).requires_grad_(False)


def dino_step(
    loss: type[DINOLoss], *, stored: bool = False, **options: Any
) -> Callable[[], Callable[[], list[Tensor]]]:
    def prepare() -> Callable[[], list[Tensor]]:
        student, teacher = head(lambda: DINOHead(IN, K, norm_last_layer=False, hidden_dim=12, bottleneck_dim=D))
        x = torch.randn(VIEWS * IMAGES, IN)
        criterion = loss(K, VIEWS, 0.04, 0.07, 2, 10, **options)

        def run() -> list[Tensor]:
            outputs = student(x), teacher(x[: 2 * IMAGES])
            outputs = tuple(o.materialize() for o in outputs) if stored else outputs
            value = criterion(*outputs, 1)
            value.backward()
            statistics = [] if criterion.statistics is None else list(vars(criterion.statistics).values())
            return [value, *(p.grad for p in student.parameters()), *criterion.buffers(), *statistics]

        return run

    return prepare


def ibot_step() -> Callable[[], list[Tensor]]:
    student, teacher = head(lambda: ibot.iBOTHead(IN, K, patch_out_dim=K, hidden_dim=12, bottleneck_dim=D))
    tokens, local = torch.randn(2 * IMAGES, 1 + 4, IN), torch.randn(2 * IMAGES, IN)
    criterion = IBOTLoss(K, K, 2, 2, 0.04, 0.04, 0.04, 0.07, 2, 10)
    masks = [torch.rand(IMAGES, 2, 2) < 0.5 for _ in range(2)]

    def run() -> list[Tensor]:
        losses = criterion(student(tokens), teacher(tokens), student(local), masks, 0)
        losses["loss"].backward()
        return [
            *losses.values(),
            *(p.grad for p in student.parameters() if p.requires_grad),
            criterion.center,
            criterion.center2,
        ]

    return run


def list_step(
    library: Any, head_class: type[nn.Module], *head_arguments: int
) -> Callable[[], Callable[[], list[Tensor]]]:
    def prepare() -> Callable[[], list[Tensor]]:
        student, teacher = head(lambda: head_class(*head_arguments))
        x, mask = torch.randn(2 * IMAGES, IN), torch.rand(2 * IMAGES, 4) < 0.5
        patches = torch.randn(2 * IMAGES, 4, IN)
        cls, patch = library.DINOLoss(K), library.iBOTPatchLoss(K)
        for loss in (cls, patch):
            getattr(loss, "init_weights", lambda: None)()

        def run() -> list[Tensor]:
            targets = cls.softmax_center_teacher(teacher(x), 0.05)
            cls.update_center(teacher(x))
            sinkhorn = patch.sinkhorn_knopp_teacher(teacher(patches[mask]), 0.05, mask.sum().reshape(1))
            patch.update_center(teacher(patches[mask])[None])
            if library is dinov2:
                value = cls(student(x).chunk(2), list(targets.chunk(2)))
            else:
                value = cls(student(x).unflatten(0, (2, IMAGES)), targets.unflatten(0, (2, IMAGES)))
            value = value + patch.forward_masked(student(patches[mask]), sinkhorn, mask)
            value.backward()
            states = [*cls.state_dict().values(), *patch.state_dict().values()]
            return [value, *(p.grad for p in student.parameters()), *states]

        return run

    return prepare


def other_drop_ins() -> Callable[[], list[Tensor]]:
    student, teacher = head(lambda: lightly.DINOProjectionHead(IN, 12, D, K))
    x = torch.randn(4 * IMAGES, IN)
    lists, pairs = lightly.DINOLoss(K), solo.DINOLoss(K, 0.04, 0.07, 2, 10)
    masked = lightly.IBOTPatchLoss(K)
    mask = torch.tensor([[[True, False], [True, True]]] * 4)

    def run() -> list[Tensor]:
        value = lists(teacher(x[: 2 * IMAGES]).chunk(2), student(x).chunk(4), epoch=0)
        value = value + masked(teacher(x), student(x), mask) + pairs(student(x), teacher(x))
        value.backward()
        return [value, *(p.grad for p in student.parameters() if p.requires_grad), lists.center, pairs.center]

    return run


def functions() -> Callable[[], list[Tensor]]:
    student, _ = head(lambda: DINOHead(IN, K, norm_last_layer=False, hidden_dim=12, bottleneck_dim=D))
    x = nn.functional.normalize(torch.randn(7, D), dim=1)
    prototypes = student.last_layer.prototypes().with_vmf()  # type: ignore[operator, union-attr]

    def run() -> list[Tensor]:
        rows = [row_log_sum_exp(x, prototypes, 0.1, backend=name) for name in ("auto", "streaming", "reference")]
        columns = [column_log_sum_exp(x, prototypes, 0.1, rows[0], backend=name) for name in ("auto", "streaming")]
        usage = [prototype_usage(x, prototypes, 0.1, backend=name) for name in ("auto", "streaming", "reference")]
        found = unique_prototypes(prototypes.effective_weight().detach(), eps=0.025)
        koleo = PrototypeKoLeoLoss()(prototypes) + KoLeoLoss()(x)
        return [*rows, *columns, *usage, found.group, koleo]

    return run


RUNS: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
    "dino": dino_step(DINOLoss),
    "dino streaming": dino_step(DINOLoss, backend="streaming"),
    "dino reference": dino_step(DINOLoss, backend="reference"),
    "dino stored": dino_step(DINOLoss, stored=True),
    "vmf": dino_step(DINOvMFLoss),
    "vmf streaming": dino_step(DINOvMFLoss, backend="streaming"),
    "sinkhorn": dino_step(DINOLoss, centering="sinkhorn_knopp"),
    "first batch": dino_step(DINOLoss, center_start="first_batch"),
    "ibot": lambda: ibot_step(),
    "dinov2": list_step(dinov2, dinov2.DINOHead, IN, K, False, 3, 12, D),
    "dinov3": list_step(dinov3, dinov3.DINOHead, IN, K, False, 3, 12, D),
    "lightly and solo": other_drop_ins,
    "functions": functions,
}


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Tensor]]:
    results = {}
    for name, prepare in RUNS.items():
        torch.manual_seed(1)
        results[name] = prepare()()
    return results


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", RUNS)
def test_results_are_the_same_under_every_default(name: str, default: str, plain: dict[str, list[Tensor]]) -> None:
    torch.manual_seed(1)
    run = RUNS[name]()
    with DEFAULTS[default]():
        results = run()
    for got, expected in zip(results, plain[name], strict=True):
        assert (got.dtype, got.device) == (expected.dtype, expected.device)
        assert torch.equal(got, expected), f"off by {(got - expected).abs().max():.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_made_under_a_default_dtype_train_with_centres_in_fp32(dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        for prepare in RUNS.values():
            value = prepare()()[0]
            assert value.isfinite().all()
        for criterion in (
            *(loss(K, VIEWS, 0.04, 0.07, 2, 10) for loss in (DINOLoss, DINOvMFLoss)),
            *(library.DINOLoss(K) for library in (dinov2, dinov3, lightly)),
        ):
            assert criterion.center.dtype == torch.float32


def test_modules_and_steps_on_the_meta_device_have_shapes() -> None:
    with torch.device("meta"):
        student = DINOHead(IN, K, norm_last_layer=False, hidden_dim=12, bottleneck_dim=D)
        criterion = DINOvMFLoss(K, VIEWS, 0.04, 0.07, 2, 10)
        x = torch.randn(VIEWS * IMAGES, IN)
        loss = criterion(student(x), student(x[: 2 * IMAGES]), 0)
    loss.backward()
    assert loss.is_meta
    assert student.last_layer.weight_v.grad is not None
    assert student.last_layer.weight_v.grad.shape == (K, D)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(6, dtype=torch.float64),
        torch.zeros(6, dtype=torch.bfloat16),
        torch.zeros(5),
        torch.zeros(3, 4)[:, :2],
        torch.zeros(6, device="meta"),
    ],
    ids=["fp64", "bf16", "too short", "strided", "meta"],
)
def test_what_does_not_fit_never_reaches_the_native_module(tensor: Tensor) -> None:
    with pytest.raises(
        RuntimeError, match=r"native module was about to get .* expected 6 contiguous fp32 numbers on the CPU"
    ):
        module.built().dot(tensor, tensor, 6)


def test_freed_memory_and_unlike_networks_never_reach_the_native_module() -> None:
    freed = torch.ones(3, D)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="native module was about to get"):
        module.built().dot(freed, freed, 3 * D)

    def op(student: int, teacher: int) -> Any:
        tau, x = torch.tensor(0.1, dtype=torch.float64), torch.randn(3, D)
        sides = [(x, torch.randn(count, D), None, "linear") for count in (student, teacher)]
        weights = (None, torch.ones(1, 1), None, tau, tau, True, True, "native", "")
        return torch.ops.vmf_kernels.prototype_cross_entropy(*sides[0], *sides[1], *weights)

    op(40, 40)
    for student, teacher in ((40, 4), (4, 4000)):
        with pytest.raises(ValueError, match=f"networks have {student} and {teacher} prototypes"):
            op(student, teacher)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 6).T, torch.zeros(4, 6, dtype=torch.float64), torch.zeros(1, 6).expand(4, 6), torch.zeros(6)],
    ids=["columns", "fp64", "overlapping", "vector"],
)
def test_prototypes_that_do_not_fit_never_reach_the_native_module(weight: Tensor) -> None:
    keys = NativeKeys(weight, "linear", None, 1.0, 1.0, None, (1.0, 1.0))
    with pytest.raises(RuntimeError, match=r"native module was about to get .* expected"):
        score_task(torch.zeros(3, 6), keys, None)
