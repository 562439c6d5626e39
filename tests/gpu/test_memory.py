"""On a GPU: what a step takes beside its results, and tensors of more than 2^31 elements.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.test_capture import loss_step, training_problem
from tests.measure import relative_error
from vmf_kernels import linear_prototypes, logit_cross_entropy, prototype_cross_entropy
from vmf_kernels.testing import Problem

K, DIM = 65_536, 256
MB, GB = 10**6, 10**9
MOST_EXTRA = 100 * MB  # at 640/128
MOST_OF_THE_LOGITS = 1 / 8  # of their growth in bf16 that a step may grow by
PASSING_2_31 = 2**21 + 3  # prototypes of dim 1024: the last three lie beyond element 2^31
MEMORY_FOR_PROTOTYPES = 40 * GB
MEMORY_FOR_LOGITS = 24 * GB
CHUNK = 2**17  # prototypes that the truth takes at once
CPU = torch.device("cpu")
BF16, FP64 = torch.bfloat16, torch.float64


def peak_extra(problem: Problem) -> int:
    """Bytes that a warm step takes at most beside its inputs and the gradients that it returns."""
    device, step = problem.student_features.device, loss_step(problem)
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = step()
    torch.cuda.synchronize(device)
    kept = sum(t.numel() * t.element_size() for name, t in results.items() if name.endswith("_gradient"))
    return torch.cuda.max_memory_allocated(device) - before - kept


@pytest.mark.gpu
def test_extra_memory_is_small_and_does_not_grow_with_the_logits(device: torch.device) -> None:
    few, many = (peak_extra(training_problem(device, images, K, DIM)) for images in (64, 384))
    assert few <= MOST_EXTRA, f"640/128 takes {few / MB:.0f} MB extra, budget {MOST_EXTRA / MB:.0f}"
    logits = (384 - 64) * (2 + 10) * K * BF16.itemsize
    grown = many - few
    assert grown <= MOST_OF_THE_LOGITS * logits, (
        f"3840/768 takes {grown / MB:.0f} MB more, budget {MOST_OF_THE_LOGITS * logits / MB:.0f}: "
        f"the logits would take {logits / MB:.0f} MB more"
    )


def needs(device: torch.device, amount: int) -> None:
    """Skip where the card has not so much memory free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < amount:
        pytest.skip(f"needs {amount / GB:.0f} GB of GPU memory, {free / GB:.0f} GB are free")
    torch.cuda.reset_peak_memory_stats(device)


def softmax_by_chunks(rows: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """([R, K] log-probabilities, [R, D] mean prototype), fp64, from a few prototypes at a time."""
    rows = rows.double()
    logits = torch.cat([rows @ part.double().T for part in torch.split(weight, CHUNK)], dim=1) / temperature
    log_p = logits.log_softmax(dim=1)
    parts = zip(torch.split(log_p, CHUNK, dim=1), torch.split(weight, CHUNK), strict=True)
    mean = torch.zeros_like(rows)
    for log_part, part in parts:
        mean += log_part.exp() @ part.double()
    return log_p, mean


def check_many_prototypes(prototypes: int, dim: int, device: torch.device) -> None:
    """One weight for both networks, a few rows, and the last three prototypes near them, so that those matter most."""
    tau_s, tau_t, rows = 0.1, 0.07, (5, 3)
    students, teachers = (
        torch.nn.functional.normalize(torch.randn(n, dim, device=device), dim=1).to(BF16) for n in rows
    )
    weight = torch.randn(prototypes, dim, device=device, dtype=BF16).mul_(dim**-0.5)
    weight[-3:] = students[:3] + teachers
    pairs = torch.rand(rows[1], rows[0], device=device)
    features, leaf = students.clone().requires_grad_(), weight.requires_grad_()
    loss, statistics = prototype_cross_entropy(
        features,
        linear_prototypes(leaf),
        teachers,
        linear_prototypes(leaf.detach()),
        pairs,
        student_temperature=tau_s,
        teacher_temperature=tau_t,
        backend="triton",
    )
    feature_gradient, weight_gradient = torch.autograd.grad(loss, [features, leaf])
    weight = leaf.detach()
    (log_p, mean_s), (log_q, mean_t) = (
        softmax_by_chunks(*side) for side in ((students, weight, tau_s), (teachers, weight, tau_t))
    )
    a_TS, x_SD, q_TK = pairs.double(), students.double(), log_q.exp()
    n_S = a_TS.sum(dim=0)
    exact = {
        "loss": -(a_TS * (q_TK @ log_p.T)).sum(),
        "usage": a_TS.sum(dim=1) @ q_TK / a_TS.sum(),
        "feature gradient": (n_S[:, None] * mean_s - a_TS.T @ mean_t) / tau_s,
        "last usage": a_TS.sum(dim=1) @ q_TK[:, -3:] / a_TS.sum(),
    }
    got = {"loss": loss, "usage": statistics.usage, "feature gradient": feature_gradient}
    got["last usage"] = statistics.usage[-3:]
    # first block, a block in the middle, and the last, whose end lies beyond 2^31 elements
    for name, part in {"first": slice(0, 64), "middle": slice(prototypes // 2, prototypes // 2 + 64)}.items():
        exact[name], got[name] = weight_gradient_of(part, log_p, q_TK, a_TS, x_SD) / tau_s, weight_gradient[part]
    for size in (64, 3):
        part = slice(prototypes - size, prototypes)
        name = f"last {size}"
        exact[name], got[name] = weight_gradient_of(part, log_p, q_TK, a_TS, x_SD) / tau_s, weight_gradient[part]
    for name, value in exact.items():
        error = relative_error(got[name], value)
        assert error <= 2e-2, f"{name}: relative error {error:.1e}, budget 2e-02"


def weight_gradient_of(part: slice, log_p: Tensor, q_TK: Tensor, a_TS: Tensor, x_SD: Tensor) -> Tensor:
    """[k, D] gradient at some effective prototypes, times the temperature: equation (5) written out."""
    pushed = (a_TS.sum(dim=0)[:, None] * log_p[:, part].exp()).T @ x_SD
    return pushed - q_TK[:, part].T @ (a_TS @ x_SD)


@pytest.mark.gpu
def test_prototypes_may_hold_more_than_2_31_elements(device: torch.device) -> None:
    needs(device, MEMORY_FOR_PROTOTYPES)
    assert PASSING_2_31 * 1024 > 2**31
    check_many_prototypes(PASSING_2_31, 1024, device)
    assert torch.cuda.max_memory_allocated(device) < MEMORY_FOR_PROTOTYPES


def check_many_logits(images: int, views: int, prototypes: int, device: torch.device) -> None:
    """The last images' gradients, which lie furthest out, against fp64, and the loss against the plain path's."""
    student, teacher = (torch.randn(n * images, prototypes, device=device, dtype=BF16) for n in (views, 1))
    weights = torch.rand(1, views, device=device) / images
    leaf = student.requires_grad_()
    loss, statistics = logit_cross_entropy(leaf, teacher, weights, backend="triton")
    (gradient,) = torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        plain = logit_cross_entropy(leaf, teacher, weights, backend="torch")
    error = max(relative_error(loss, plain.loss), relative_error(statistics.usage, plain.statistics.usage))
    assert error <= 2e-5, f"loss and usage: relative difference {error:.1e} from the plain path, budget 2e-05"

    def last(rows: Tensor) -> Tensor:
        """Rows of the last two images."""
        return rows.detach().view(-1, images, prototypes)[:, -2:].reshape(-1, prototypes)

    exact_leaf = last(leaf).double().requires_grad_()
    exact, _ = logit_cross_entropy(exact_leaf, last(teacher).double(), weights.double(), backend="torch")
    error = relative_error(last(gradient), torch.autograd.grad(exact, exact_leaf)[0])
    assert error <= 4e-3, f"gradient of the last images: relative error {error:.1e}, budget 4e-03"  # half a bf16 step


@pytest.mark.gpu
def test_stored_logits_may_hold_more_than_2_31_elements(device: torch.device) -> None:
    needs(device, MEMORY_FOR_LOGITS)
    images, views = 2049, 16
    assert images * views * K > 2**31
    check_many_logits(images, views, K, device)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size() -> None:
    check_many_prototypes(131, 24, CPU)
    check_many_logits(3, 4, 100, CPU)
