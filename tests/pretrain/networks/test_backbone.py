"""Student and teacher: the same at the start, views of any size, one row of features for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pretrain.tiny import build_networks, differing, digits_config, one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.networks.average import follow
from vmf_pretrain.networks.headed import Headed
from vmf_pretrain.networks.stochastic_depth import StochasticDepth

pytestmark = pytest.mark.quick

IMAGES = 3
VIEWS = [torch.randn(IMAGES, 1, side, side, generator=torch.Generator().manual_seed(0)) for side in (16, 16, 8, 8)]


def rates(network: Headed) -> list[float]:
    return [part.rate for part in network.modules() if isinstance(part, StochasticDepth)]


def test_teacher_starts_as_the_student() -> None:
    student, teacher = build_networks(digits_config())
    assert differing(student.state_dict(), teacher.state_dict()) == []


def test_networks_share_no_memory() -> None:
    student, teacher = build_networks(digits_config())
    shared = {value.data_ptr() for value in student.parameters()} & {value.data_ptr() for value in teacher.parameters()}
    assert not shared


def test_teacher_wants_no_gradient_and_the_student_does() -> None:
    student, teacher = build_networks(digits_config())
    assert not [name for name, value in teacher.named_parameters() if value.requires_grad]
    assert not [name for name, value in student.named_parameters() if not value.requires_grad]


def test_stochastic_depth_is_the_students_alone() -> None:
    student, teacher = build_networks(digits_config(backbone={"drop_path": 0.3, "depth": 3}))
    assert max(rates(student)) == pytest.approx(0.3), f"the student's rates are {rates(student)}"
    assert not any(rates(teacher)), f"the teacher's rates are {rates(teacher)}"


def test_features_are_view_major_and_those_of_each_view_alone() -> None:
    student, _ = build_networks(digits_config())
    student.eval()
    features, logits = student(VIEWS)
    expected = torch.cat([student.backbone(view) for view in VIEWS])
    error = (features - expected).abs().max().item()
    assert features.shape == (len(VIEWS) * IMAGES, 16)
    assert logits.shape == (len(VIEWS) * IMAGES, 32)
    assert error < 1e-5, f"off by {error:.1e}"


def test_views_of_one_size_go_through_the_backbone_together() -> None:
    student, _ = build_networks(digits_config())
    seen: list[tuple[int, ...]] = []
    student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    student(VIEWS)
    assert seen == [(2 * IMAGES, 1, 16, 16), (2 * IMAGES, 1, 8, 8)]


@pytest.mark.parametrize(("method", "frozen"), [("dino", True), ("dino-vmf", False)])
def test_prototypes_of_dino_have_frozen_norms_and_those_of_dino_vmf_free_ones(method: str, frozen: bool) -> None:
    student, _ = build_networks(digits_config(method=method))
    norms: Any = student.head.last_layer.weight_g
    assert norms.requires_grad is not frozen
    assert (norms == 1).all()


def test_teacher_follows_the_student_in_parameters_and_keeps_its_buffers() -> None:
    student, teacher = build_networks(digits_config())
    before = {name: value.detach().clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for value in (*student.parameters(), *(value for value in student.buffers() if value.is_floating_point())):
            value.add_(1.0)
    follow(teacher, student, 0.25)
    parameters = {name for name, _ in teacher.named_parameters()}
    for name, value in teacher.state_dict().items():
        expected = before[name] + 0.25 if name in parameters else before[name]
        assert torch.allclose(value, expected, atol=1e-6), f"{name} is off by {(value - expected).abs().max():.1e}"


def test_xavier_reaches_every_linear_layer_and_no_prototype() -> None:
    xavier, _ = build_networks(digits_config())
    for name, module in xavier.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            largest = module.weight.abs().max().item()
            assert 0.9 * bound < largest <= bound, f"{name}: largest weight {largest:.3f}, bound {bound:.3f}"
    directions: Any = xavier.head.last_layer.weight_v
    assert directions.abs().max() <= 1 / directions.shape[1] ** 0.5, "the prototypes were initialised anew"


@pytest.mark.parametrize(
    ("backbone", "part"),
    [
        ({"name": "vit_smal_patch16"}, "vit_smal_patch16"),
        ({"name": "resnet18", "width": None, "depth": None, "heads": None}, "resnet18"),
        ({"width": 16, "heads": 3}, "vit_small_patch16_224"),
    ],
    ids=["unknown", "no transformer", "width not divisible by heads"],
)
def test_backbone_that_cannot_be_built_is_named_in_one_sentence(backbone: dict[str, Any], part: str) -> None:
    with pytest.raises(PretrainError, match="cannot be built as a vision transformer") as caught:
        build_networks(digits_config(backbone=backbone))
    message = str(caught.value)
    assert one_sentence(message), message
    assert part in message
