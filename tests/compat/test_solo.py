"""The drop-in for solo-learn against its formulas written out: steps, state dicts, signatures, errors.

Legend: B images, V crops, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.fuzz.statements.dino import follow
from tests.fuzz.statements.solo import PublishedSoloHead, PublishedSoloLoss
from tests.measure import worst_error
from vmf_kernels import PrototypeLogits
from vmf_kernels.compat import solo

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, in norm, of each tensor of each step
SEEN = 100  # a broken formula must be off by so many budgets
STEPS, IMAGES, IN_DIM, PROTOTYPES = 6, 4, 12, 301
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_dim": 16, "bottleneck_dim": 24}
SCHEDULE = (0.04, 0.07, 4, STEPS)  # teacher temperatures and their epochs: every step of the warm-up has its own
DTYPES = [pytest.param(torch.float64, id="fp64"), pytest.param(torch.float32, id="fp32")]

Record = dict[str, Tensor]


def our_network(dtype: torch.dtype, *, use_bn: bool, frozen: bool = False) -> solo.DINOHead:
    """A head whose features differ between rows, with norms between 0.5 and 1.5 of either sign unless frozen."""
    head = solo.DINOHead(IN_DIM, PROTOTYPES, use_bn, frozen, **SIZES).double()
    with torch.no_grad():
        for layer in head.mlp.children():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(15)
        if not frozen:
            g = head.last_layer.weight_g
            g.copy_((0.5 + torch.rand_like(g)) * torch.randn_like(g).sign())
    return head.to(dtype)


def twin_of(head: solo.DINOHead, dtype: torch.dtype, *, use_bn: bool, frozen: bool = False) -> PublishedSoloHead:
    """The published head with the parameters of ours."""
    twin = PublishedSoloHead(IN_DIM, PROTOTYPES, use_bn, frozen, **SIZES).to(dtype)
    twin.load_state_dict(head.state_dict())
    return twin


def train(student: nn.Module, teacher: nn.Module, loss: Any, crops: int) -> Record:
    """Steps of momentum SGD as its method takes them, crop by crop; every loss, gradient and centre by step."""
    batches = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.02, momentum=0.5)
    dtype = next(student.parameters()).dtype
    teacher.requires_grad_(False)
    record: Record = {}
    for step in range(STEPS):
        x = torch.randn(crops, IMAGES, IN_DIM, generator=batches).to(dtype).requires_grad_()
        loss.epoch = step
        optimizer.zero_grad()
        p = torch.cat([student(crop) for crop in x])
        p_momentum = torch.cat([teacher(crop.detach() + 0.1) for crop in x[:2]])
        value = loss(p, p_momentum)
        value.backward()
        assert x.grad is not None
        gradients = {name: q.grad for name, q in student.named_parameters() if q.grad is not None}
        if isinstance(student.mlp[1], nn.BatchNorm1d):  # type: ignore[index]
            del gradients["mlp.0.bias"]  # 0 but for rounding: the mean takes the bias out again
        measured = {"loss": value.detach(), "input": x.grad, "center": loss.center, **gradients}
        record |= {f"step {step} {name}": tensor.clone() for name, tensor in measured.items()}
        optimizer.step()
        follow(teacher, student, 0.9)
    return record


def error_over_steps(
    head: str, dtype: torch.dtype, *, crops: int = 2, use_bn: bool = False, frozen: bool = False, **changed: Any
) -> tuple[float, str]:
    """The worst error against the formulas in fp64 from the same numbers; ``changed`` options are of our side only."""
    networks = our_network(dtype, use_bn=use_bn, frozen=frozen), our_network(dtype, use_bn=use_bn, frozen=frozen)
    oracle = PublishedSoloLoss(PROTOTYPES, *SCHEDULE, num_large_crops=crops).double()
    student, teacher = (twin_of(network, torch.float64, use_bn=use_bn, frozen=frozen) for network in networks)
    expected = train(student, teacher, oracle, crops)
    ours = solo.DINOLoss(PROTOTYPES, *SCHEDULE, num_large_crops=crops, **changed).to(dtype)
    if head == "our-head":
        return worst_error(train(*networks, ours, crops), expected)
    student, teacher = (twin_of(network, dtype, use_bn=use_bn, frozen=frozen) for network in networks)
    return worst_error(train(student, teacher, ours, crops), expected)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_bn", [False, True], ids=["plain", "batch-norm"])
@pytest.mark.parametrize("head", ["our-head", "published-head"])
def test_steps_equal_the_published_ones(head: str, use_bn: bool, dtype: torch.dtype) -> None:
    error, quantity = error_over_steps(head, dtype, use_bn=use_bn)
    assert error <= BUDGET[dtype], f"{quantity}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("options", [{"crops": 4}, {"frozen": True}], ids=["four-crops", "frozen-norms"])
def test_steps_with_options_equal_the_published_ones(options: dict[str, Any]) -> None:
    error, quantity = error_over_steps("our-head", torch.float64, **options)
    assert error <= 1e-10, f"{quantity}: relative error {error:.2e}, budget 1e-10"


@pytest.mark.quick
@pytest.mark.parametrize("changed", [{"center_momentum": 0.8}, {"student_temp": 0.11}])
def test_a_changed_option_is_seen(changed: dict[str, Any]) -> None:
    """Negative control of the comparisons above."""
    error, _ = error_over_steps("our-head", torch.float32, **changed)
    assert error > SEEN * BUDGET[torch.float32], f"relative difference {error:.2e}"


@pytest.mark.quick
def test_the_epoch_selects_the_temperature() -> None:
    logits = torch.randn(8, 50)
    values = []
    for epoch in (0, 3, 5):
        loss = solo.DINOLoss(50, *SCHEDULE)
        assert loss.epoch == 0
        loss.epoch = epoch
        values.append(loss(logits, logits).item())
    assert abs(values[0] - values[1]) > 1e-3
    assert values[1] == values[2]


@pytest.mark.quick
@pytest.mark.parametrize("use_bn", [False, True])
def test_state_dicts_go_both_ways(use_bn: bool) -> None:
    ours, theirs = our_network(torch.float32, use_bn=use_bn), PublishedSoloHead(IN_DIM, PROTOTYPES, use_bn, **SIZES)
    x = torch.randn(9, IN_DIM)
    assert (theirs(x) - ours(x).materialize()).abs().max() > 1e-2, "the negative control, before loading, agrees"
    theirs.load_state_dict(ours.state_dict())
    again = solo.DINOHead(IN_DIM, PROTOTYPES, use_bn, **SIZES)
    again.load_state_dict(copy.deepcopy(theirs).state_dict())
    loss, published = solo.DINOLoss(PROTOTYPES, *SCHEDULE), PublishedSoloLoss(PROTOTYPES, *SCHEDULE)
    loss(ours(torch.randn(8, IN_DIM)), ours(torch.randn(8, IN_DIM)))
    for network in (ours, theirs, again):
        network.eval()
    assert isinstance(ours(x), PrototypeLogits)
    torch.testing.assert_close(again(x).materialize(), theirs(x))
    published.load_state_dict(loss.state_dict())
    assert published.center.ne(0).any(), "the centre has not moved"
    back = solo.DINOLoss(PROTOTYPES, *SCHEDULE)
    back.load_state_dict(published.state_dict())
    assert torch.equal(back.center, loss.center)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("ours", "published"),
    [(solo.DINOHead, PublishedSoloHead), (solo.DINOLoss, PublishedSoloLoss)],
    ids=["head", "loss"],
)
def test_signature_starts_with_the_published_one(ours: Any, published: Any) -> None:
    for method in ("__init__", "forward"):
        got, expected = (list(inspect.signature(getattr(c, method)).parameters.values()) for c in (ours, published))
        assert [(p.name, p.default) for p in got[: len(expected)]] == [(p.name, p.default) for p in expected]
        assert all(p.kind == p.VAR_KEYWORD for p in got[len(expected) :])


@pytest.mark.quick
def test_published_parameters_are_the_documented_ones() -> None:
    """The published side of the comparison, spelt out: a shared slip would pass above."""
    required = inspect.Parameter.empty
    head = {"in_dim": required, "num_prototypes": required, "use_bn": True, "norm_last_layer": True}
    sizes = {"num_layers": 3, "hidden_dim": 2048, "bottleneck_dim": 256}
    names = ("num_prototypes", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "num_epochs")
    loss = dict.fromkeys(names, required) | {"student_temp": 0.1, "num_large_crops": 2, "center_momentum": 0.9}
    spelt: dict[Any, dict[str, Any]] = {solo.DINOHead: head | sizes, solo.DINOLoss: loss}
    for made, expected in spelt.items():
        got = {p.name: p.default for p in list(inspect.signature(made.__init__).parameters.values())[1:]}
        got.pop("options", None)
        assert got == expected
    assert list(inspect.signature(solo.DINOLoss.forward).parameters) == ["self", "student_output", "teacher_output"]


@pytest.mark.quick
def test_update_center_takes_logits_as_the_published_one_or_what_waits() -> None:
    logits = torch.randn(8, 50)
    given, waited, whole = (
        solo.DINOLoss(50, *SCHEDULE, center_update=update) for update in ("forward", "manual", "forward")
    )
    given.update_center(logits)
    waited(logits, logits)
    assert waited.center.eq(0).all()
    waited.update_center()
    whole(logits, logits)
    assert whole.center.ne(0).any()
    for loss in (given, waited):
        assert torch.equal(loss.center, whole.center)


def make(**options: Any) -> solo.DINOLoss:
    return solo.DINOLoss(9, *SCHEDULE, **options)


def at_epoch(epoch: int) -> object:
    loss = make()
    loss.epoch = epoch
    return loss(torch.zeros(4, 9), torch.zeros(4, 9))


def update_at_epoch(epoch: int) -> None:
    loss = make()
    loss.epoch = epoch
    loss.update_center(torch.zeros(4, 9))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: at_epoch(STEPS), f"epoch is {STEPS}; expected 0 to {STEPS - 1}"),
        (lambda: update_at_epoch(STEPS), f"epoch is {STEPS}; expected 0 to {STEPS - 1}"),
        (lambda: update_at_epoch(-1), f"epoch is -1; expected 0 to {STEPS - 1}"),
        (lambda: make(num_large_crops=1), "ncrops is 1; expected at least 2"),
        (
            lambda: make()(torch.zeros(5, 9), torch.zeros(4, 9)),
            "student output has 5 rows; expected a multiple of its 2",
        ),
        (lambda: make()(torch.zeros(4, 8), torch.zeros(4, 8)), "teacher output has 8 prototypes; expected out_dim = 9"),
    ],
)
def test_a_mistake_is_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_epochs_compile_once() -> None:
    student, teacher = torch.randn(8, 50), torch.randn(8, 50)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    ours, eager = (solo.DINOLoss(50, 0.04, 0.07, 5, 12) for _ in range(2))
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for epoch in range(12):
        ours.epoch = eager.epoch = epoch
        torch.testing.assert_close(compiled(student, teacher), eager(student, teacher))
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times"
