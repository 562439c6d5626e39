"""On a GPU: autocast, GradScaler, gradients that add up, and a graph that is kept.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.measure import relative_error
from vmf_kernels import (
    DINOHead,
    DINOvMFLoss,
    linear_prototypes,
    logit_cross_entropy,
    prototype_cross_entropy,
    prototype_usage,
)
from vmf_kernels.ops.assignments import row_log_sum_exp

K, DIM, IN_DIM = 65_536, 256, 128
IMAGES, CROPS = 16, 6
CPU = torch.device("cpu")
FP16, BF16 = torch.float16, torch.bfloat16
FITTING_SCALE = 2.0**12  # no step is left out because of it: the scaler's own start, 2^16, overflows at toy size
ROUNDING_OF_FP16 = 2e-2  # relative, in norm: 5e-4 of each feature and weight, times logits of up to 25


def unit_rows(count: int, dim: int, device: torch.device) -> Tensor:
    return nn.functional.normalize(torch.randn(count, dim, device=device), dim=1)


def check_autocast(prototypes: int, dim: int, device: torch.device) -> None:
    """Under autocast fp32 features give, on a GPU, what their rounding to bf16 gives; on the CPU they stay fp32."""
    students, teachers = unit_rows(CROPS * IMAGES, dim, device), unit_rows(2 * IMAGES, dim, device)
    keys = linear_prototypes(torch.randn(prototypes, dim, device=device))
    pairs = torch.rand(2, CROPS, device=device)

    def outcome(dtype: torch.dtype) -> dict[str, Tensor]:
        x = students.to(dtype).requires_grad_()
        w = keys.weight.detach().requires_grad_()
        t = teachers.to(dtype)
        loss, statistics = prototype_cross_entropy(x, linear_prototypes(w), t, keys, pairs, backend="triton")
        gradients = torch.autograd.grad(loss, [x, w])
        return {
            "loss": loss.detach(),
            "usage": statistics.usage,
            "features": gradients[0],
            "weight": gradients[1],
            "teacher usage": prototype_usage(t, keys, 0.07, backend="triton"),
            "row log-sums": row_log_sum_exp(t, keys, 0.07, backend="triton"),
        }

    with torch.autocast(device.type, BF16):
        inside = outcome(torch.float32)
    outside = outcome(BF16 if device.type == "cuda" else torch.float32)
    assert inside["features"].dtype == torch.float32
    changed = [name for name in outside if not torch.equal(inside[name], outside[name].float())]
    assert not changed, f"{changed} are not those of the features that autocast asks for"


@pytest.mark.gpu
def test_autocast_rounds_fp32_features_to_its_dtype(device: torch.device) -> None:
    check_autocast(K, DIM, device)


def head_and_loss(prototypes: int, dim: int, device: torch.device, backend: str) -> tuple[DINOHead, DINOvMFLoss]:
    """Prototypes of norms around 1; the loss moves its centre only where it is told to."""
    head = DINOHead(IN_DIM, prototypes, norm_last_layer=False, nlayers=1, bottleneck_dim=dim).to(device)
    with torch.no_grad():
        head.last_layer.weight_g.mul_(0.5 + torch.rand_like(head.last_layer.weight_g))
    loss = DINOvMFLoss(prototypes, CROPS, 0.04, 0.04, 0, 1, center_update="manual", backend=backend)
    return head, loss.to(device)


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient at {missing}"
    return {name: gradient.detach().clone() for name, gradient in found.items() if gradient is not None}


def check_grad_scaler(prototypes: int, dim: int, device: torch.device, steps: int = 4) -> None:
    """fp16 under autocast, scaled, against the same step in fp32 on the streaming backend."""
    student, loss_fn = head_and_loss(prototypes, dim, device, "triton")
    teacher, (_, plain_loss_fn) = copy.deepcopy(student), head_and_loss(prototypes, dim, device, "streaming")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=FITTING_SCALE)
    for step in range(steps):
        crops = torch.randn(CROPS * IMAGES, IN_DIM, device=device)
        views = crops[: 2 * IMAGES] + 0.1 * torch.randn(2 * IMAGES, IN_DIM, device=device)
        plain = copy.deepcopy(student)
        plain_loss_fn(plain(crops), teacher(views).detach(), 0).backward()
        optimizer.zero_grad()
        with torch.autocast(device.type, FP16):
            student_output, teacher_output = student(crops), teacher(views).detach()
            loss = loss_fn(student_output, teacher_output, 0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        got, expected = gradients_of(student), gradients_of(plain)
        for name, value in expected.items():
            error = relative_error(got[name], value)
            assert error <= ROUNDING_OF_FP16, f"step {step}, {name}: relative error {error:.1e}, budget 2e-02"
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() >= before, f"step {step} was left out: a gradient was not finite"
        loss_fn.update_center()
        plain_loss_fn.center.copy_(loss_fn.center)


@pytest.mark.gpu
def test_a_grad_scaler_s_steps_in_fp16_follow_fp32(device: torch.device) -> None:
    check_grad_scaler(K, DIM, device)


def check_sums_of_gradients(prototypes: int, dim: int, device: torch.device) -> None:
    """Two micro-batches add up; a kept graph gives its gradients again, and a scaled loss theirs scaled."""
    weight = torch.randn(prototypes, dim, device=device)
    teachers, pairs = unit_rows(4, dim, device).to(BF16), torch.rand(2, 3, device=device)
    batches = [unit_rows(6, dim, device).to(BF16) for _ in range(2)]

    def loss(rows: Tensor, leaf: Tensor) -> Tensor:
        keys = linear_prototypes(weight)
        total: Tensor = prototype_cross_entropy(
            rows, linear_prototypes(leaf), teachers, keys, pairs, backend="triton"
        ).loss
        return total

    leaf = weight.clone().requires_grad_()
    single = [torch.autograd.grad(loss(rows, leaf), leaf)[0].clone() for rows in batches]
    for rows in batches:
        loss(rows, leaf).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, single[0] + single[1]), "micro-batches do not add up"
    value = loss(batches[0], leaf)
    kept = [torch.autograd.grad(value, leaf, retain_graph=True)[0].clone() for _ in range(2)]
    assert torch.equal(kept[0], single[0]), "the first gradient of a kept graph is another"
    assert torch.equal(kept[1], single[0]), "the second gradient of a kept graph is another"
    tripled = torch.autograd.grad(3 * loss(batches[0], leaf), leaf)[0]
    assert torch.equal(tripled, 3 * single[0]), "a loss times 3 has not 3 times the gradient"


@pytest.mark.gpu
def test_gradients_add_up_and_a_kept_graph_gives_them_again(device: torch.device) -> None:
    check_sums_of_gradients(K, DIM, device)


def check_stored_logits(images: int, prototypes: int, device: torch.device) -> None:
    """bf16 logits on the kernels against fp64 on the plain path: a rounding of the gradient, else of scores up to 160."""
    students, teachers = (torch.randn(n * images, prototypes, device=device, dtype=BF16) for n in (CROPS, 2))
    biases = torch.randn(2, prototypes, device=device)
    pairs, images_weights = torch.rand(2, CROPS, device=device), torch.rand(images, device=device)

    def outcome(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        x, bias = students.to(dtype).requires_grad_(), biases[0].detach().to(torch.promote_types(dtype, torch.float32))
        bias = bias.requires_grad_()
        loss, statistics = logit_cross_entropy(
            x,
            teachers.to(dtype),
            pairs,
            student_bias=bias,
            teacher_bias=biases[1],
            image_weights=images_weights,
            backend=backend,
        )
        gradient, bias_gradient = torch.autograd.grad(loss, [x, bias])
        return {"loss": loss.detach(), **vars(statistics), "bias": bias_gradient, "logits": gradient}

    got, exact = outcome(BF16, "triton"), outcome(torch.float64, "torch")
    for name, value in exact.items():
        error, budget = relative_error(got[name], value), 4e-3 if name == "logits" else 3e-5
        if name in ("teacher_entropy", "student_entropy", "kl"):  # nats, that may be few
            error = float((got[name] - value).abs() / (1 + value.abs()))
        assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.0e}"


@pytest.mark.gpu
def test_stored_bf16_logits_match_the_plain_path_in_fp64(device: torch.device) -> None:
    check_stored_logits(64, K, device)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("IMAGES", 1), ("CROPS", 2)):
        monkeypatch.setitem(globals(), name, few)
    check_autocast(33, 64, CPU)
    check_grad_scaler(33, 64, CPU, steps=1)
    check_sums_of_gradients(33, 64, CPU)
    check_stored_logits(2, 100, CPU)
