"""The drop-in for facebookresearch/dino: signatures, and checkpoints of its shape loaded its way and ours."""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOHead, PublishedDINOLoss
from vmf_kernels.compat import dino

pytestmark = pytest.mark.quick

IN_DIM, PROTOTYPES, CROPS = 6, 31, 4
SIZES: dict[str, Any] = {"nlayers": 3, "hidden_dim": 16, "bottleneck_dim": 8}
SCHEDULE = (PROTOTYPES, CROPS, 0.04, 0.07, 2, 5)


class MultiCrop(nn.Module):
    """Backbone and head under the published names."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x))


def published_model() -> MultiCrop:
    model = MultiCrop(nn.Linear(5, IN_DIM), PublishedDINOHead(IN_DIM, PROTOTYPES, norm_last_layer=False, **SIZES))
    with torch.no_grad():
        model.head.last_layer.weight_g.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    return model


def our_model() -> MultiCrop:
    return MultiCrop(nn.Linear(5, IN_DIM), dino.DINOHead(IN_DIM, PROTOTYPES, norm_last_layer=False, **SIZES))


@pytest.fixture
def published() -> dict[str, Any]:
    """Student, teacher and loss of a run under way, the loss with a centre that has moved."""
    student, teacher, loss = published_model(), published_model(), PublishedDINOLoss(*SCHEDULE)
    loss(student(torch.randn(8, 5)), teacher(torch.randn(4, 5)), 0)
    return {"student": student, "teacher": teacher, "dino_loss": loss}


@pytest.fixture
def checkpoint(published: dict[str, Any]) -> dict[str, Any]:
    """What the published trainer saves: the student under DDP, the teacher not, and its command line."""
    student = published["student"]
    return {
        "student": {f"module.{key}": value for key, value in student.state_dict().items()},
        "teacher": published["teacher"].state_dict(),
        "optimizer": torch.optim.AdamW(student.parameters(), lr=np.float64(0.001)).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", out_dim=PROTOTYPES, lr=0.0005, output_dir=".", use_fp16=True),
        "dino_loss": published["dino_loss"].state_dict(),
    }


@pytest.fixture
def saved(checkpoint: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path)
    return path


def assert_same_network(ours: MultiCrop, published: MultiCrop) -> None:
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x).materialize(), published(x))


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("source", ["file", "text-path", "mapping"])
def test_load_checkpoint_restores_networks_and_center(
    source: str, network: str, saved: Path, checkpoint: dict[str, Any], published: dict[str, Any]
) -> None:
    model, loss = our_model(), dino.DINOLoss(*SCHEDULE)
    given: Any = {"file": saved, "text-path": str(saved), "mapping": checkpoint}[source]
    dino.load_checkpoint(given, network=network, backbone=model.backbone, head=model.head, loss=loss)
    assert_same_network(model, published[network])
    assert torch.equal(loss.center, published["dino_loss"].center)
    assert loss.center.ne(0).any()


def test_networks_of_the_checkpoint_differ(published: dict[str, Any]) -> None:
    """Negative control: the wrong network would be seen."""
    x = torch.randn(4, 5)
    assert (published["student"](x) - published["teacher"](x)).abs().max() > 1e-2


def test_load_checkpoint_takes_the_teacher_by_default_and_only_what_is_asked(
    saved: Path, published: dict[str, Any]
) -> None:
    model = our_model()
    before = copy.deepcopy(model.backbone.state_dict())
    dino.load_checkpoint(saved, head=model.head)
    assert torch.equal(model.head.last_layer.weight_v, published["teacher"].head.last_layer.weight_v)  # type: ignore[union-attr, arg-type]
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_loading_leaves_a_given_mapping_as_it_was(checkpoint: dict[str, Any]) -> None:
    keys = {name: list(entry) for name, entry in checkpoint.items() if isinstance(entry, dict)}
    dino.load_checkpoint(checkpoint, head=our_model().head, loss=dino.DINOLoss(*SCHEDULE))
    assert {name: list(entry) for name, entry in checkpoint.items() if isinstance(entry, dict)} == keys


def test_the_codebases_own_restart_loads_it(checkpoint: dict[str, Any], published: dict[str, Any]) -> None:
    """Its ``restart_from_checkpoint``: every entry by ``load_state_dict(strict=False)``, the loss by ``load_state_dict``."""
    student, teacher, loss = nn.Module(), our_model(), dino.DINOLoss(*SCHEDULE)
    student.module = our_model()  # as DDP wraps it
    reports = [
        student.load_state_dict(checkpoint["student"], strict=False),
        teacher.load_state_dict(checkpoint["teacher"], strict=False),
        loss.load_state_dict(checkpoint["dino_loss"], strict=False),
    ]
    assert [(r.missing_keys, r.unexpected_keys) for r in reports] == [([], [])] * 3
    assert_same_network(student.module, published["student"])
    assert_same_network(teacher, published["teacher"])
    assert torch.equal(loss.center, published["dino_loss"].center)


def test_a_checkpoint_of_ours_loads_into_the_published_code() -> None:
    model, loss = our_model(), dino.DINOLoss(*SCHEDULE)
    loss(model(torch.randn(8, 5)), model(torch.randn(4, 5)), 0)
    other, other_loss = published_model(), PublishedDINOLoss(*SCHEDULE)
    other.load_state_dict(model.state_dict())
    other_loss.load_state_dict(loss.state_dict())
    assert_same_network(model, other)
    assert torch.equal(other_loss.center, loss.center)


def test_a_vmf_loss_loads_the_same_entry(checkpoint: dict[str, Any], published: dict[str, Any]) -> None:
    loss = dino.DINOvMFLoss(*SCHEDULE, centering="logit")
    dino.load_checkpoint(checkpoint, loss=loss)
    assert torch.equal(loss.center, published["dino_loss"].center)


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (dino.DINOHead.__init__, PublishedDINOHead.__init__),
        (dino.DINOLoss.__init__, PublishedDINOLoss.__init__),
        (dino.DINOvMFLoss.__init__, PublishedDINOLoss.__init__),
    ],
    ids=["head", "loss", "vmf-loss"],
)
def test_signature_starts_with_the_published_one(ours: Any, published: Any) -> None:
    got, expected = (list(inspect.signature(f).parameters.values()) for f in (ours, published))
    assert [(p.name, p.default) for p in got[: len(expected)]] == [(p.name, p.default) for p in expected]
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in got[: len(expected)])
    added = got[len(expected) :]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in added), f"{added} could be given by position"


def test_published_parameters_are_the_documented_ones() -> None:
    """The published side of the comparison, spelt out: a shared slip would pass above."""
    names = list(inspect.signature(dino.DINOLoss.__init__).parameters)[1:9]
    assert names == [
        *("out_dim", "ncrops", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "nepochs"),
        *("student_temp", "center_momentum"),
    ]
    defaults = [p.default for p in inspect.signature(dino.DINOLoss.__init__).parameters.values()][7:9]
    assert defaults == [0.1, 0.9]
    for loss in (dino.DINOLoss, dino.DINOvMFLoss):
        assert list(inspect.signature(loss.forward).parameters)[:4] == [
            *("self", "student_output", "teacher_output", "epoch"),
        ]
    head = inspect.signature(dino.DINOHead.__init__).parameters.values()
    assert [(p.name, p.default) for p in head][1:] == [
        ("in_dim", inspect.Parameter.empty),
        ("out_dim", inspect.Parameter.empty),
        ("use_bn", False),
        ("norm_last_layer", True),
        ("nlayers", 3),
        ("hidden_dim", 2048),
        ("bottleneck_dim", 256),
    ]


def test_an_unknown_network_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="network is 'both'; expected one of teacher, student"):
        dino.load_checkpoint(saved, network="both")


def test_a_missing_entry_is_named(checkpoint: dict[str, Any]) -> None:
    del checkpoint["teacher"]
    with pytest.raises(ValueError, match=r"has the entries student, optimizer, .* expected 'teacher' among them"):
        dino.load_checkpoint(checkpoint, head=our_model().head)
    del checkpoint["dino_loss"]
    with pytest.raises(ValueError, match="expected 'dino_loss' among them"):
        dino.load_checkpoint(checkpoint, loss=dino.DINOLoss(*SCHEDULE))


def test_a_missing_prefix_is_named(checkpoint: dict[str, Any]) -> None:
    checkpoint["teacher"] = {k: v for k, v in checkpoint["teacher"].items() if k.startswith("backbone.")}
    with pytest.raises(ValueError, match=r"teacher entry has keys under backbone; expected some under 'head.'"):
        dino.load_checkpoint(checkpoint, head=our_model().head)


@pytest.mark.parametrize("entry", [None, 3, [1, 2]])
def test_an_entry_that_is_no_state_dict_is_named(entry: Any, checkpoint: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"entry 'teacher' is {type(entry).__name__}; expected a mapping"):
        dino.load_checkpoint(checkpoint | {"teacher": entry}, head=our_model().head)


def test_a_file_that_holds_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="checkpoint holds Tensor; expected a mapping with the entry 'teacher'"):
        dino.load_checkpoint(tmp_path / "tensor.pth", head=our_model().head)


def test_a_tensor_of_another_shape_or_a_missing_one_is_refused(checkpoint: dict[str, Any]) -> None:
    checkpoint["teacher"]["head.last_layer.weight_g"] = torch.ones(PROTOTYPES + 1, 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for last_layer.weight_g"):
        dino.load_checkpoint(checkpoint, head=our_model().head)
    del checkpoint["teacher"]["head.last_layer.weight_g"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*last_layer.weight_g"):
        dino.load_checkpoint(checkpoint, head=our_model().head)
