"""Gradients that could be lost silently: either they arrive or an error says that they would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmf_kernels import (
    DINOHead,
    DINOLoss,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    TeacherTargets,
    fuse_head,
    linear_prototypes,
    logit_cross_entropy,
    matched_prototype_cross_entropy,
    prototype_cross_entropy,
    target_cross_entropy,
)
from vmf_kernels.compat import dinov2, dinov3, ibot, lightly, solo

K, D, IN = 33, 8, 6
CROPS = 3


def prototypes() -> Any:
    return linear_prototypes(torch.randn(K, D))


def on_features(**given: Any) -> Any:
    weights = given.pop("pair_weights", torch.ones(2, 2))
    return prototype_cross_entropy(torch.randn(4, D), prototypes(), torch.randn(4, D), prototypes(), weights, **given)


def on_matched(row_weights: Tensor) -> Any:
    return matched_prototype_cross_entropy(
        torch.randn(4, D), prototypes(), torch.randn(4, D), prototypes(), row_weights
    )


def on_logits(**given: Any) -> Any:
    return logit_cross_entropy(
        torch.randn(4, K), torch.randn(4, K), given.pop("pair_weights", torch.ones(2, 2)), **given
    )


def on_targets(**given: Any) -> Any:
    targets = TeacherTargets(torch.randn(4, K), given.pop("temperature", 0.1), given.pop("bias", None))
    return target_cross_entropy(torch.randn(4, K), targets, torch.ones(2, 2), **given)


@pytest.mark.parametrize(
    ("call", "name", "shape"),
    [
        (on_features, "pair_weights", (2, 2)),
        (on_features, "image_weights", (2,)),
        (on_features, "student_temperature", ()),
        (on_features, "teacher_temperature", ()),
        (on_features, "teacher_bias", (K,)),
        (on_matched, "row_weights", (4,)),
        (on_logits, "pair_weights", (2, 2)),
        (on_logits, "image_weights", (2,)),
        (on_logits, "student_temperature", ()),
        (on_logits, "teacher_temperature", ()),
        (on_logits, "teacher_bias", (K,)),
        (on_targets, "temperature", ()),
        (on_targets, "bias", (K,)),
        (on_targets, "student_temperature", ()),
        (on_targets, "image_weights", (2,)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_argument_that_wants_a_gradient_none_is_formed_for_is_refused(
    call: Callable[..., Any], name: str, shape: tuple[int, ...]
) -> None:
    wanting = torch.ones(shape, requires_grad=True)
    with pytest.raises(ValueError, match=r"\w+ requires a gradient, but only the student.*expected \w+.detach"):
        call(**{name: wanting})
    with torch.no_grad():
        call(**{name: wanting})
    call(**{name: wanting.detach()})


class Plain(nn.Module):
    """A head of one's own, to be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(IN, D)
        self.last_layer = nn.Linear(D, K, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))


def parametrized() -> nn.Module:
    head = Plain()
    nn.utils.parametrizations.weight_norm(head.last_layer)
    return fuse_head(head)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "dino": lambda: DINOHead(IN, K, norm_last_layer=False, hidden_dim=12, bottleneck_dim=D),
    "fused": lambda: fuse_head(Plain()),
    "fused weight norm": parametrized,
    "ibot": lambda: ibot.iBOTHead(IN, K, hidden_dim=12, bottleneck_dim=D),
    "dinov2": lambda: dinov2.DINOHead(IN, K, hidden_dim=12, bottleneck_dim=D),
    "dinov2 vmf": lambda: dinov2.DINOvMFHead(IN, K, hidden_dim=12, bottleneck_dim=D),
    "dinov3": lambda: dinov3.DINOHead(IN, K, hidden_dim=12, bottleneck_dim=D),
    "lightly": lambda: lightly.DINOProjectionHead(IN, 12, D, K),
    "solo": lambda: solo.DINOHead(IN, K, hidden_dim=12, bottleneck_dim=D),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[request.param]()


def loss_of(student: PrototypeLogits, **options: Any) -> Tensor:
    torch.manual_seed(1)
    teacher = PrototypeLogits(torch.randn(4, D), linear_prototypes(torch.randn(K, D)))
    teacher = teacher.with_vmf() if student.prototypes.has_normalizer else teacher
    loss: Tensor = DINOLoss(K, CROPS, 0.04, 0.04, 0, 10, **options)(student, teacher, 0)
    return loss


def gradients(head: nn.Module, loss: Tensor, x: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [*(p for p in head.parameters() if p.requires_grad), x], allow_unused=True))


def rows() -> Tensor:
    return torch.randn(2 * CROPS, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()


def test_a_head_without_autograd_gives_a_loss_without_a_gradient(head: nn.Module) -> None:
    with torch.no_grad():
        output = head(rows())
    assert not output.requires_grad
    assert not loss_of(output).requires_grad, "as with stored logits"


def test_a_reentrant_checkpoint_around_the_head_says_that_its_gradient_would_be_lost(head: nn.Module) -> None:
    output = checkpoint(head, rows(), use_reentrant=True)
    looks = (lambda o: o.max(-1), lambda o: o.mean(), lambda o: PrototypeKoLeoLoss()(o.prototypes))
    for use in (loss_of, PrototypeLogits.materialize, *looks):
        with pytest.raises(
            RuntimeError, match=r"gradient would be lost; expected checkpoint\(\.\.\., use_reentrant=False\)"
        ):
            use(output)
    with torch.no_grad():
        loss_of(output)  # evaluated without a gradient, nothing is lost


@pytest.mark.parametrize("around", ["the head", "head and loss", "head and loss, reentrant"])
def test_a_checkpoint_gives_the_gradients_that_there_are_without(head: nn.Module, around: str) -> None:
    x = rows()
    expected = gradients(head, loss_of(head(x)), x)
    if around == "the head":
        loss = loss_of(checkpoint(head, x, use_reentrant=False))
        got = gradients(head, loss, x)
    else:
        loss = checkpoint(lambda x: loss_of(head(x), center_update="manual"), x, use_reentrant="reentrant" in around)
        loss.backward()
        got = [p.grad for p in (*(p for p in head.parameters() if p.requires_grad), x)]
    assert all(a is not None and torch.equal(a, b) for a, b in zip(got, expected, strict=True) if b is not None)


def test_own_autograd_functions_around_the_head_are_seen_as_well(head: nn.Module) -> None:
    class Around(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Any:
            return head(x)

    class WithSetUp(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Tensor) -> Any:
            return head(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    for function in (Around, WithSetUp):
        with pytest.raises(RuntimeError, match="their gradient would be lost"):
            loss_of(function.apply(rows()))  # type: ignore[no-untyped-call]


def test_a_centre_that_a_checkpoint_would_move_twice_says_what_to_do(head: nn.Module) -> None:
    x = rows()
    with pytest.raises(RuntimeError, match=r"centre would move twice.*expected center_update='manual'"):
        checkpoint(lambda x: loss_of(head(x)), x, use_reentrant=True)
    with torch.no_grad():
        loss_of(head(x))  # evaluated, it moves once


def test_in_place_changes_of_the_teacher_and_inference_mode_do_not_reach_the_backward_pass() -> None:
    torch.manual_seed(0)
    student = HEADS["dino"]()
    teacher = torch.optim.swa_utils.AveragedModel(student)
    x, criterion = rows(), DINOLoss(K, CROPS, 0.04, 0.04, 0, 10)
    expected = gradients(student, criterion(student(x), teacher(x[:4]), 0), x)
    for stored in (False, True):
        with torch.inference_mode():
            output = teacher(x[:4])
        outputs = (student(x), output) if not stored else (student(x).materialize(), output.materialize())
        criterion = DINOLoss(K, CROPS, 0.04, 0.04, 0, 10)
        loss = criterion(*outputs, 0)
        got = gradients(student, loss, x)
        for ours, wanted in zip(got, expected, strict=True):
            assert ours is None or (wanted is not None and torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5))
    loss = DINOLoss(K, CROPS, 0.04, 0.04, 0, 10)(student(x), teacher(x[:4]), 0)
    teacher.update_parameters(student)
    with torch.no_grad():
        torch._foreach_lerp_(list(teacher.module.parameters()), list(student.parameters()), 0.5)
    teacher.module.load_state_dict(student.state_dict())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass of prototype_cross_entropy.*changed in place"):
        loss.backward()
