"""Student and teacher: the same at the start, views of any size, one row of features for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretrain.methods.plain import embedded, through
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


def bicubic(table: Tensor, wanted: int, factor: float) -> Tensor:
    """[wanted, ...] of a table [n, ...]: cubic convolution with a = -0.75, edges repeated, without antialiasing."""
    rows = []
    for place in range(wanted):
        centre = (place + 0.5) / factor - 0.5
        row = torch.zeros_like(table[0])
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            far = abs(centre - tap)
            near = 1.25 * far**3 - 2.25 * far**2 + 1
            weight = near if far <= 1 else -0.75 * (far**3 - 5 * far**2 + 8 * far - 4)
            row = row + weight * table[min(max(tap, 0), len(table) - 1)]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("registers", [0, 2])
def test_features_of_local_views_are_those_of_the_published_network(registers: int) -> None:
    """The formula of a vision transformer, with DINO's way to resize positions, in fp64."""
    shape = {"patch_size": 2, "width": 8, "heads": 2, "registers": registers, "initialisation": "timm"}
    features = {}
    local = torch.randn(IMAGES, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for way in ("dino", "timm"):
        torch.manual_seed(0)
        student, _ = build_networks(
            digits_config(backbone={**shape, "resize_positions": way}, views={"local_size": 6, "local_count": 1})
        )
        features[way] = student.double().eval().backbone(local)
    w = {name: value.detach() for name, value in student.backbone.state_dict().items()}
    prefix = 0 if registers else 1  # with registers, the class token has its position in itself
    table, factor = w["pos_embed"][0, prefix:].unflatten(0, (8, 8)), 3.1 / 8
    rows = bicubic(table, 3, factor)
    positions = bicubic(rows.transpose(0, 1), 3, factor).transpose(0, 1).flatten(0, 1)
    expected = []
    for image in local:
        first = w["cls_token"][0] + (0 if registers else w["pos_embed"][0, :1])
        tokens = [first, w["reg_token"][0]] if registers else [first]
        placed = torch.cat([*tokens, embedded(image, w, "", 2) + positions])
        expected.append(through(placed, w, "", 2)[0])
    error = (features["dino"] - torch.stack(expected)).abs().max().item()
    apart = ((features["timm"] - features["dino"]).norm() / features["dino"].norm()).item()
    assert error < 1e-12, f"off by {error:.1e}"
    assert apart > 1e-6, f"timm's positions give the same to {apart:.1e}: this test shows nothing"


def test_class_token_starts_as_dinos() -> None:
    spread = {}
    for way in ("timm", "dino"):
        student, teacher = build_networks(digits_config(backbone={"initialisation": way, "width": 256}))
        mine, theirs = (each.backbone.get_parameter("cls_token") for each in (student, teacher))
        spread[way] = mine.std().item()
        assert torch.equal(mine, theirs)
    assert spread["timm"] < 1e-5
    assert 0.017 < spread["dino"] < 0.023, f"deviation {spread['dino']:.4f}"


def test_positions_of_another_kind_of_transformer_are_resized_as_timm_does() -> None:
    with pytest.raises(
        PretrainError, match=r"resize_positions is dino but deit_small_distilled.* expected timm"
    ) as caught:
        build_networks(digits_config(backbone={"name": "deit_small_distilled_patch16_224", "resize_positions": "dino"}))
    assert one_sentence(str(caught.value))
