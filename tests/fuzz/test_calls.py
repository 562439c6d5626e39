"""Calls of losses from several threads, changes in place, and copies: what holds for every one of them.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    linear_prototypes,
    logit_cross_entropy,
    prototype_cross_entropy,
    prototype_usage,
    vmf_prototypes,
)
from vmf_kernels.backends.native import module
from vmf_kernels.testing import Problem, library_outcome, random_problem

BACKENDS = ["reference", "streaming", *(["native"] if module.native() is not None else [])]
CALLERS = 4  # Python threads
K, D = 300, 16


def same_bits(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_python_threads_get_what_one_gets(backend: str, threads: int) -> None:
    problems = [
        random_problem(images=3, views=(2, 4), prototypes=1000, dim=24, dtype=torch.float32) for _ in range(CALLERS)
    ]
    torch.set_num_threads(threads)
    alone = [library_outcome(problem, backend) for problem in problems]

    def called(problem: Problem) -> Any:
        torch.set_num_threads(threads)  # OpenMP has the number for each thread
        return library_outcome(problem, backend)

    with ThreadPoolExecutor(CALLERS) as pool:
        for _ in range(3):
            together = list(pool.map(called, problems))
            wrong = [i for i, (one, other) in enumerate(zip(alone, together, strict=True)) if not same_bits(one, other)]
            assert not wrong, f"calls {wrong} of {CALLERS} have other bits than alone"


def test_one_head_serves_several_python_threads() -> None:
    """The same prototypes, and so the same places where a call keeps what it has prepared."""
    prototypes = vmf_prototypes(torch.randn(2049, D))
    rows = [torch.randn(5, D) for _ in range(CALLERS)]
    logits = [PrototypeLogits(x, prototypes) for x in rows]
    rules = [DINOvMFLoss(2049, 2, 0.04, 0.04, 0, 1, centering="sinkhorn_knopp") for _ in rows]

    def called(i: int) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(1)
        x = torch.cat([logits[i], logits[i]])  # type: ignore[list-item]
        return rules[i](x, x, 0), prototype_usage(rows[i], prototypes, 0.1)

    alone = [called(i) for i in range(CALLERS)]
    with ThreadPoolExecutor(CALLERS) as pool:
        for _ in range(5):
            for one, other in zip(alone, pool.map(called, range(CALLERS)), strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])


Call = Callable[[Tensor, Tensor], Tensor]


def of_prototypes(student: Tensor, weight: Tensor) -> Tensor:
    teacher = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    own = linear_prototypes(torch.ones(K, D).tril())
    return prototype_cross_entropy(student, linear_prototypes(weight), teacher, own, torch.ones(2, 3)).loss


def of_logits(student: Tensor, weight: Tensor) -> Tensor:
    return logit_cross_entropy(student @ weight.T, torch.ones(4, K).tril(), torch.ones(2, 3)).loss


CALLS: dict[str, Call] = {
    "prototype_cross_entropy": of_prototypes,
    "logit_cross_entropy": of_logits,
    "KoLeoLoss": lambda student, weight: KoLeoLoss()(student) + 0 * weight.sum(),
    "PrototypeKoLeoLoss": lambda student, weight: PrototypeKoLeoLoss()(weight) + 0 * student.sum(),
}


def refusal(call: Callable[[], object]) -> str:
    """What the RuntimeError says that a call raises; "" if it raises none."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def leaves() -> tuple[Tensor, Tensor]:
    return torch.randn(6, D, requires_grad=True), torch.randn(K, D, requires_grad=True)


@pytest.mark.parametrize("name", CALLS)
def test_a_retained_graph_gives_the_same_gradients_again(name: str) -> None:
    given = leaves()
    loss = CALLS[name](*given)
    first = torch.autograd.grad(loss, given, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # whoever has a gradient may write into it
    for again in (torch.autograd.grad(loss, given, retain_graph=True), torch.autograd.grad(loss, given)):
        for one, other in zip(kept, again, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("which", [0, 1], ids=["rows", "prototypes"])
def test_one_input_may_need_no_gradient(which: int, name: str) -> None:
    given = leaves()
    both = torch.autograd.grad(CALLS[name](*given), given)
    alone = [t.detach().requires_grad_(i == which) for i, t in enumerate(given)]
    (one,) = torch.autograd.grad(CALLS[name](*alone), alone[which])
    assert torch.allclose(one, both[which], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused_or_right(name: str) -> None:
    given = [t.detach()[:5, :4].double().requires_grad_() for t in leaves()]

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        if name == "logit_cross_entropy":
            return logit_cross_entropy(student @ weight.T, torch.ones(2, 5).tril().double(), torch.ones(2, 5)).loss
        if name == "prototype_cross_entropy":
            p = linear_prototypes(weight)
            return prototype_cross_entropy(student, p, student.detach()[:2], p, torch.ones(2, 5)).loss
        return CALLS[name](student, weight)

    gradients = torch.autograd.grad(loss(*given), given, create_graph=True)
    total = sum(g.square().sum() for g in gradients)
    said = refusal(lambda: torch.autograd.grad(total, given, allow_unused=True))  # type: ignore[arg-type]
    if said:
        assert "cannot be differentiated twice" in said
        return
    used = [
        i for i, g in enumerate(gradients) if g.any()
    ]  # a loss of one of the two has a constant gradient, 0, at the other
    (i,) = used
    assert torch.autograd.gradgradcheck(
        lambda x: loss(*(x if j == i else t.detach() for j, t in enumerate(given))), given[i]
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("which", [0, 1], ids=["rows", "prototypes"])
def test_an_input_that_changes_before_the_backward_pass_is_noticed_or_does_not_matter(which: int, name: str) -> None:
    given = leaves()
    expected = torch.autograd.grad(CALLS[name](*given), given)
    inner = [t.detach().clone().requires_grad_() for t in given]
    computed = [t * 1 for t in inner]
    loss = CALLS[name](*computed)
    with torch.no_grad():
        computed[which].mul_(2)
    got: list[Tensor] = []
    said = refusal(lambda: got.extend(torch.autograd.grad(loss, inner)))
    if said:
        assert "modified by an inplace operation" in said
        return
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), "the gradient is of other inputs than the loss"


MODULES: dict[str, Callable[[], nn.Module]] = {
    "DINOLoss": lambda: DINOLoss(K, 3, 0.04, 0.07, 2, 4),
    "DINOvMFLoss": lambda: DINOvMFLoss(K, 3, 0.04, 0.07, 2, 4),
    "DINOvMFLoss, manual": lambda: DINOvMFLoss(K, 3, 0.04, 0.07, 2, 4, center_update="manual"),
    "DINOLoss, Sinkhorn": lambda: DINOLoss(K, 3, 0.04, 0.07, 2, 4, centering="sinkhorn_knopp"),
    "DINOLoss, first batch": lambda: DINOLoss(K, 3, 0.04, 0.07, 2, 4, center_start="first_batch"),
    "IBOTPatchLoss": lambda: IBOTPatchLoss(K),
}


def stepped(loss: nn.Module, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(K, D, generator=random) for _ in range(2))
    if isinstance(loss, IBOTPatchLoss):
        rows = [torch.randn(2, 4, D, generator=random) for _ in range(2)]
        mask = torch.eye(4)[:2].bool()
        value: Tensor = loss(
            *(PrototypeLogits(x, linear_prototypes(w)) for x, w in zip(rows, (student, teacher), strict=True)),
            mask,
            0.05,
        )
        return value
    rows = [torch.randn(n, D, generator=random) for n in (6, 4)]
    outputs = (PrototypeLogits(x, linear_prototypes(w)) for x, w in zip(rows, (student, teacher), strict=True))
    return loss(*outputs, 1)  # type: ignore[no-any-return]


def saved_and_loaded(loss: nn.Module) -> nn.Module:
    """Another loss with this one's state."""
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(loss)
    stepped(other, 9)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "state_dict": saved_and_loaded,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_goes_on_as_the_loss_itself(name: str, how: str) -> None:
    loss = MODULES[name]()
    stepped(loss, 1)
    if "manual" in name and how == "state_dict":
        loss.update_center()  # type: ignore[operator]  # a state dict holds no pending batches, as documented
    other = HOW[how](loss)
    for seed in (2, 3):
        one, two = stepped(loss, seed), stepped(other, seed)
        assert torch.equal(one, two)
        if "manual" in name:
            loss.update_center(), other.update_center()  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), other.state_dict().values(), strict=True))
