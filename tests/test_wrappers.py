"""Outputs inside tools around modules: precision plugins, replicas, einops, FLOP counters, ``torch.func``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from vmf_kernels import (
    DINOHead,
    DINOLoss,
    DINOvMFLoss,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    logit_cross_entropy,
    prototype_cross_entropy,
)
from vmf_kernels.compat import dinov2
from vmf_kernels.prototypes import linear_prototypes
from vmf_pretrain import with_torchvision  # noqa: F401 -- lightning looks for torchvision

K, D, IN, VIEWS = 37, 8, 6, 3


def head_of(**options: Any) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(IN, K, norm_last_layer=False, hidden_dim=12, bottleneck_dim=D, **options)


def rows(images: int = 2) -> Tensor:
    return torch.randn(VIEWS * images, IN, generator=torch.Generator().manual_seed(1))


def step(student: Callable[[Tensor], Any], teacher: Callable[[Tensor], Any], x: Tensor, calls: int = 1) -> Tensor:
    """The loss, each network called so often."""
    global_rows = 2 * len(x) // VIEWS
    outputs = [
        torch.cat([net(part) for part in of.chunk(calls)]) for net, of in ((student, x), (teacher, x[:global_rows]))
    ]
    loss: Tensor = DINOLoss(K, VIEWS, 0.04, 0.04, 0, 10)(*outputs, 0)
    return loss


class Nested(nn.Module):
    """Returns its logits inside of other things."""

    def __init__(self) -> None:
        super().__init__()
        self.head = head_of()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"pair": (self.head(x), x.sum()), "list": [self.head(x)]}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_lightning_fabric_hands_out_logits_that_train(precision: Any) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = head_of()
    student: Any = fabric.setup(copy.deepcopy(plain))
    teacher: Any = fabric.setup_module(copy.deepcopy(plain).requires_grad_(False))
    loss, expected = step(student, teacher, rows(), calls=2), step(plain, plain, rows())
    fabric.backward(loss)
    expected.backward()
    tolerance = 1e-5 if precision.startswith(("32", "64")) else 0.1
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    for (name, parameter), wanted in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None, f"{name} got no gradient"
        assert wanted.grad is not None
        error = (parameter.grad.double() - wanted.grad.double()).norm() / wanted.grad.norm().double()
        assert error <= 5 * tolerance, f"{name}: relative error {error:.1e}"
    output = fabric.setup(Nested())(rows())
    assert all(isinstance(logits, PrototypeLogits) for logits in (output["pair"][0], output["list"][0]))


def test_accelerate_hands_out_logits_that_train() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    student = accelerator.prepare(head_of())
    output = student(rows())
    assert output.dtype == torch.float32, "what it casts outputs to"
    accelerator.backward(step(student, head_of(), rows()))
    assert all(p.grad is not None for p in student.parameters())


def test_a_replica_of_data_parallel_says_what_to_do() -> None:
    layer = head_of().last_layer
    replica = layer._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.clone())  # as torch.nn.parallel.replicate leaves it
    with pytest.raises(RuntimeError, match=r"DataParallel joins the stored tensors.*expected DistributedDataParallel"):
        replica(torch.randn(3, D))


def test_sync_batch_norm_conversion_and_averaged_models_leave_a_head_that_trains() -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head_of(use_bn=True)).eval()
    averaged = torch.optim.swa_utils.AveragedModel(converted).eval()
    step(converted, averaged, rows()).backward()
    assert converted.last_layer.weight_v.grad is not None


def test_flops_are_those_of_stored_logits() -> None:
    student, teacher, x = head_of(), head_of().requires_grad_(False), rows()
    counts = {}
    for stored in (False, True):
        with FlopCounterMode(display=False) as counter:
            outputs = student(x), teacher(x[:4])
            if stored:
                outputs = outputs[0].materialize(), outputs[1].materialize()
            prepared = DINOLoss(K, VIEWS, 0.04, 0.04, 0, 10, center_update="manual", centering="logit")
            loss = prepared(*outputs, 0)
            loss.backward()
        counts[stored] = counter.get_total_flops()
    center = 2 * 2 * K * D  # of unstored logits, W times the mean row, in two columns on a CPU
    assert counts[False] - center == counts[True]


@pytest.mark.parametrize("loss", [DINOLoss, DINOvMFLoss])
def test_func_grad_gives_the_gradients_of_backward_and_the_centre_moves(loss: type[DINOLoss]) -> None:
    student, teacher, x = head_of(), head_of().requires_grad_(False), rows()
    parameters = {name: p.detach() for name, p in student.named_parameters()}
    centers = []

    def of(parameters: dict[str, Tensor], criterion: DINOLoss, inside: bool) -> Tensor:
        targets = teacher(x[:4]) if inside else outside
        value: Tensor = criterion(functional_call(student, parameters, (x,)), targets, 0)
        return value

    outside = teacher(x[:4])
    for inside in (True, False):
        criterion = loss(K, VIEWS, 0.04, 0.04, 0, 10)
        got = grad(of)(parameters, criterion, inside)
        centers.append(criterion.center.clone())
        expected = loss(K, VIEWS, 0.04, 0.04, 0, 10)
        student.zero_grad()
        expected(student(x), outside, 0).backward()
        centers.append(expected.center.clone())
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(got[name], parameter.grad, rtol=1e-5, atol=1e-7), name
    # to rounding: inside of a transformation the sums of a centre of probabilities have passes of their own
    assert all(torch.allclose(center, centers[0], rtol=1e-5, atol=1e-6) for center in centers)
    assert centers[0].abs().max() > 0, "the centre stood still"


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "vmap"])
def test_vmap_is_one_call_for_each_member(order: str) -> None:
    torch.manual_seed(0)
    batch, teacher = torch.randn(4, 3, D), torch.randn(3, D)
    student, other = linear_prototypes(torch.randn(K, D)), linear_prototypes(torch.randn(K, D))

    def loss(x: Tensor) -> Tensor:
        return prototype_cross_entropy(x, student, teacher, other, torch.ones(3, 3)).loss

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    if order == "vmap":
        got, expected = vmap(loss)(batch), torch.stack([loss(x) for x in batch])
    else:
        got = vmap(grad(loss))(batch) if order == "vmap of grad" else grad(lambda x: vmap(loss)(x).sum())(batch)
        expected = torch.stack([gradient(x) for x in batch])
    assert torch.allclose(got, expected, rtol=1e-5), f"off by {(got - expected).abs().max():.1e}"


def test_centres_inside_vmap_say_what_to_do() -> None:
    student, teacher = head_of(), head_of().requires_grad_(False)
    for criterion in (DINOLoss(K, VIEWS, 0.04, 0.04, 0, 10), DINOvMFLoss(K, VIEWS, 0.04, 0.04, 0, 10)):
        with pytest.raises(RuntimeError, match=r"a centre cannot take in .* inside torch.vmap.*expected"):
            vmap(lambda x, loss=criterion: loss(student(x), teacher(x[:4]), 0))(torch.stack([rows(), rows()]))
    with pytest.raises(RuntimeError, match=r"a centre cannot take in .* inside torch.vmap"):
        vmap(lambda x: dinov2.DINOLoss(K).update_center(teacher(x)))(torch.stack([rows(), rows()]))


def test_func_grad_of_koleo_equals_backward() -> None:
    weight = torch.randn(9, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (expected,) = torch.autograd.grad(PrototypeKoLeoLoss()(weight), weight)
    assert torch.allclose(grad(PrototypeKoLeoLoss())(weight.detach()), expected)


@pytest.mark.parametrize(
    "pattern",
    [
        "(v b) k -> v b k",
        "(v b) k -> b v k",
        "(v b) k -> (b v) k",
        "n k -> n 1 k",
        "(v b) ... -> b v ...",
    ],
)
def test_einops_rearranges_rows(pattern: str) -> None:
    logits = head_of()(rows())
    sizes = {"v": VIEWS} if "v" in pattern else {}
    got = einops.rearrange(logits, pattern, **sizes)
    assert torch.equal(got.materialize(), einops.rearrange(logits.materialize(), pattern, **sizes))
    assert got.requires_grad


def test_einops_repeats_and_joins_rows_and_refuses_what_needs_values() -> None:
    logits = head_of()(rows())
    for unstored, stored in (
        (einops.repeat(logits, "n k -> r n k", r=2), einops.repeat(logits.materialize(), "n k -> r n k", r=2)),
        (einops.rearrange([logits, logits], "t n k -> (t n) k"), torch.cat([logits.materialize()] * 2)),
    ):
        assert torch.equal(unstored.materialize(), stored)
    refusals: list[Callable[[], object]] = [
        lambda: einops.rearrange(logits, "n k -> k n"),
        lambda: einops.reduce(logits, "n k -> n", "mean"),
    ]
    for refused in refusals:
        with pytest.raises((TypeError, ValueError), match=r"materialize\(\)"):
            refused()


def function_of_rows() -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    teacher, other = torch.randn(3, D), linear_prototypes(torch.randn(K, D))
    return lambda x, w: prototype_cross_entropy(x, linear_prototypes(w), teacher, other, torch.ones(3, 3)).loss


def stored_rows() -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(3, K)
    return lambda x, w: logit_cross_entropy(x @ w.T, teacher, torch.ones(3, 3)).loss


@pytest.mark.parametrize("make", [function_of_rows, stored_rows])
def test_levels_of_func_inside_each_other_keep_their_gradients(make: Callable[..., Any]) -> None:
    loss = make()
    x, w = torch.randn(3, D), torch.randn(K, D)
    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain, w), plain)

    def value_inside(x: Tensor) -> Tensor:
        value: Tensor = torch.func.grad_and_value(lambda w: loss(x, w))(w)[1]
        return value

    assert torch.allclose(grad(value_inside)(x), expected, rtol=1e-5)
    assert torch.allclose(torch.autograd.grad(value_inside(plain), plain)[0], expected, rtol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad(lambda x: grad(lambda x: loss(x, w))(x).sum())(x)


@pytest.mark.parametrize("make", [function_of_rows, stored_rows])
def test_forward_mode_says_that_there_is_none(make: Callable[..., Any]) -> None:
    loss = make()
    x, w = torch.randn(3, D), torch.randn(K, D)
    for ask in (
        lambda: torch.func.jvp(lambda x: loss(x, w), (x,), (x,)),
        lambda: torch.func.jacfwd(lambda w: loss(x, w))(w),
        lambda: torch.func.hessian(lambda x: loss(x, w))(x),
    ):
        with pytest.raises(RuntimeError, match=r"no forward-mode gradient|cannot be differentiated twice"):
            ask()
    gradient = torch.func.grad(lambda x: loss(x, w))
    for over_reverse in (lambda: torch.func.jvp(gradient, (x,), (x,)), lambda: torch.func.jacfwd(gradient)(x)):
        with pytest.raises(RuntimeError, match=r"no forward-mode gradient"):
            over_reverse()
    assert torch.func.jacrev(lambda x: loss(x, w))(x).shape == x.shape


def test_forward_mode_of_what_is_logged_equals_reverse_mode() -> None:
    x, w = torch.randn(3, D), torch.randn(K, D)

    def largest(x: Tensor) -> Tensor:
        return PrototypeLogits(x, linear_prototypes(w)).amax(-1)

    assert torch.allclose(torch.func.jacfwd(largest)(x), torch.func.jacrev(largest)(x))


def test_batched_gradients_and_empty_batches() -> None:
    loss, x, w = function_of_rows(), torch.randn(3, D, requires_grad=True), torch.randn(K, D)
    value = loss(x, w)
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    (got,) = torch.autograd.grad(value, x, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert torch.allclose(got, torch.stack([expected, 2 * expected]))
    with pytest.raises(ValueError, match="over a batch of 0"):
        vmap(lambda x: loss(x, w))(torch.randn(0, 3, D))


def test_comparing_logits_is_refused_not_false() -> None:
    logits = head_of()(rows())
    comparisons: list[Callable[[], object]] = [lambda: logits == 0, lambda: logits != logits]
    for compare in comparisons:
        with pytest.raises(TypeError, match=r"materialize\(\)"):
            compare()
    assert logits in {logits}, "still an object that can be a key"


def pruned(head: DINOHead) -> DINOHead:
    prune.random_unstructured(head.last_layer, "weight_v", amount=0.3)
    return head


def parametrized(head: DINOHead) -> DINOHead:
    class Scaled(nn.Module):
        def forward(self, g: Tensor) -> Tensor:
            return 2 * g

    nn.utils.parametrize.register_parametrization(head.last_layer, "weight_g", Scaled())
    return head


def normed_again(head: DINOHead) -> DINOHead:
    nn.utils.remove_weight_norm(head.last_layer)
    nn.utils.parametrizations.weight_norm(head.last_layer)
    return head


@pytest.mark.parametrize("change", [pruned, parametrized, normed_again])
def test_two_calls_of_a_head_that_computes_its_prototypes_are_of_one_head(change: Callable[..., Any]) -> None:
    head, x = change(head_of()), rows()
    expected = step(head, head, x)
    expected.backward()
    gradients = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    joined = step(head, head, x, calls=2)
    joined.backward()
    assert torch.allclose(joined, expected)
    for got, wanted in zip((p.grad for p in head.parameters()), gradients, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    with pytest.raises(ValueError, match="different prototypes"):
        torch.cat([head(x), change(head_of())(x)])


def test_shapes_of_a_step_on_the_meta_device() -> None:
    with torch.device("meta"):
        student, x = head_of(), torch.randn(VIEWS * 2, IN)
        step(student, student, x).backward()
        logits = student(x)
        assert logits.max(-1)[1].shape == (VIEWS * 2,)
        assert logits.mean().is_meta


def test_a_centre_that_diverged_stays_nan() -> None:
    student, teacher, x = head_of(), head_of().requires_grad_(False), rows()
    for bad in (torch.full((1, K), torch.nan), torch.zeros(1, K).index_fill(1, torch.tensor([3]), torch.nan)):
        criterion = DINOLoss(K, VIEWS, 0.04, 0.04, 0, 10)
        criterion.load_state_dict({"center": bad})
        for _ in range(2):
            assert criterion(student(x), teacher(x[:4]), 0).isnan(), (
                "a checkpoint of a diverged run healed without a word"
            )
