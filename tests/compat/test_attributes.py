"""Attributes and methods of the published classes: each drop-in has them, with their values.

The table was read off the published classes; lightly's are compared with lightly's own instances.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.compat.lightly_networks import published
from vmf_kernels.compat import dino, dinov2, dinov3, ibot, lightly, solo

pytestmark = pytest.mark.quick

K, K2, DIM, IMAGES, PATCHES, EPOCHS, TAU = 11, 7, 5, 4, 6, 4, 0.06
SCHEDULE = np.array([0.04, 0.07, 0.07, 0.07])
CALL = object()  # a method
TEMPERATURES = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 2}
ZERO, ZERO2 = torch.zeros(1, K), torch.zeros(1, 1, K2)
LINEAR = {"in_features": DIM, "out_features": K, "bias": None, "weight": (K, DIM)}
WEIGHT_NORM = LINEAR | {"weight_g": (K, 1), "weight_v": (K, DIM)}
LAZY = {
    "student_temp": 0.1,
    "center_momentum": 0.9,
    "updated": True,
    "reduce_handle": None,
    "async_batch_center": None,
    **dict.fromkeys(("softmax_center_teacher", "sinkhorn_knopp_teacher", "forward", "update_center"), CALL),
    **dict.fromkeys(("reduce_center_update", "apply_center_update"), CALL),
}
MASKED = {"forward_masked": CALL, "len_teacher_patch_tokens": None}
KOLEO = {"pdist.norm": 2, "pdist.eps": 1e-8, "pairwise_NNs_inner": CALL, "forward": CALL}
SMALL: dict[str, Any] = {"hidden_dim": 8, "bottleneck_dim": DIM}


def of_layer(attributes: dict[str, Any], name: str = "last_layer") -> dict[str, Any]:
    return {f"{name}.{attribute}": value for attribute, value in attributes.items()}


def make_dino(**options: Any) -> Any:
    return dino.DINOLoss(**({"out_dim": K, "ncrops": 3, "nepochs": EPOCHS} | TEMPERATURES | options))


def make_ibot(**options: Any) -> Any:
    sizes = {"out_dim": K, "patch_out_dim": K2, "ngcrops": 2, "nlcrops": 1, "nepochs": EPOCHS}
    second = {"warmup_teacher_temp2": 0.04, "teacher_temp2": 0.07}
    return ibot.iBOTLoss(**(sizes | TEMPERATURES | second | options))


def make_solo(**options: Any) -> Any:
    return solo.DINOLoss(**({"num_prototypes": K, "num_epochs": EPOCHS} | TEMPERATURES | options))


def make_lightly(**options: Any) -> Any:
    return lightly.DINOLoss(**({"output_dim": K} | TEMPERATURES | options))


# class, then its published attributes ("of.a.part" too); a tuple stands for a tensor's shape
PUBLISHED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dino.DINOLoss": (
        make_dino,
        {"student_temp": 0.1, "center_momentum": 0.9, "ncrops": 3, "center": ZERO, "teacher_temp_schedule": SCHEDULE}
        | {"forward": CALL, "update_center": CALL},
    ),
    "ibot.iBOTLoss": (
        make_ibot,
        {"student_temp": 0.1, "center_momentum": 0.9, "center_momentum2": 0.9, "ngcrops": 2, "nlcrops": 1, "ncrops": 3}
        | {"center": ZERO, "center2": ZERO2, "lambda1": 1.0, "lambda2": 1.0, "forward": CALL, "update_center": CALL}
        | {"teacher_temp_schedule": SCHEDULE, "teacher_temp2_schedule": SCHEDULE},
    ),
    "solo.DINOLoss": (
        make_solo,
        {"epoch": 0, "student_temp": 0.1, "center_momentum": 0.9, "num_large_crops": 2, "center": ZERO}
        | {"teacher_temp_schedule": SCHEDULE, "forward": CALL, "update_center": CALL},
    ),
    "dinov2.DINOLoss": (lambda: dinov2.DINOLoss(K), LAZY | {"center": ZERO, "len_teacher_output": None}),
    "dinov2.iBOTPatchLoss": (lambda: dinov2.iBOTPatchLoss(K2), LAZY | MASKED | {"center": ZERO2}),
    "dinov2.KoLeoLoss": (dinov2.KoLeoLoss, KOLEO),
    "dinov3.DINOLoss": (
        lambda: dinov3.DINOLoss(K),
        LAZY | {"center": ZERO + torch.nan, "init_weights": CALL, "len_teacher_output": None},
    ),
    "dinov3.iBOTPatchLoss": (
        lambda: dinov3.iBOTPatchLoss(K2),
        LAZY | MASKED | {"center": ZERO2 + torch.nan, "init_weights": CALL},
    ),
    "dinov3.KoLeoLoss": (dinov3.KoLeoLoss, KOLEO),
    "dinov3.KoLeoLossDistributed": (dinov3.KoLeoLossDistributed, KOLEO | {"topk": 1, "loss_group_size": None}),
    "dino.DINOHead": (lambda: dino.DINOHead(3, K, **SMALL), {"mlp": CALL} | of_layer(WEIGHT_NORM)),
    "solo.DINOHead": (lambda: solo.DINOHead(3, K, **SMALL), {"mlp": CALL} | of_layer(WEIGHT_NORM)),
    "ibot.iBOTHead": (
        lambda: ibot.iBOTHead(3, K, patch_out_dim=K, **SMALL),
        {"mlp": CALL, "last_norm": None, "last_norm2": None}
        | of_layer(WEIGHT_NORM)
        | of_layer(WEIGHT_NORM, "last_layer2"),
    ),
    "dinov2.DINOHead": (lambda: dinov2.DINOHead(3, K, **SMALL), {"mlp": CALL} | of_layer(WEIGHT_NORM)),
    "dinov3.DINOHead": (
        lambda: dinov3.DINOHead(3, K, **SMALL),
        {"mlp": CALL, "init_weights": CALL} | of_layer(LINEAR),
    ),
}


def part(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step)
    return module


def assert_value(got: Any, expected: Any, name: str) -> None:
    if expected is CALL:
        assert callable(got), name
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=f"{name} is {got}")
    elif isinstance(expected, np.ndarray):
        assert isinstance(got, np.ndarray), name
        np.testing.assert_allclose(got, expected, rtol=1e-12, err_msg=name)
    elif isinstance(expected, tuple) and isinstance(got, Tensor):
        assert tuple(got.shape) == expected, name
    else:
        assert type(got) is type(expected), name
        assert got == expected, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_drop_in_has_the_published_attributes(name: str) -> None:
    make, attributes = PUBLISHED[name]
    module = make()
    for attribute, expected in attributes.items():
        assert_value(part(module, attribute), expected, attribute)


LIGHTLY: dict[str, dict[str, Any]] = {
    "DINOLoss": {"output_dim": K} | TEMPERATURES,
    "IBOTPatchLoss": {"output_dim": K},
    "KoLeoLoss": {"p": 3},
    "DINOProjectionHead": {"input_dim": 3, "output_dim": K, "freeze_last_layer": 2} | SMALL,
    "DINOv2ProjectionHead": {"input_dim": 3, "output_dim": K} | SMALL,
}


def public_names(module: nn.Module) -> list[str]:
    """What ``nn.Module`` itself does not have."""
    return [name for name in dir(module) if not name.startswith("_") and name not in dir(nn.Module())]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", LIGHTLY)
def test_a_drop_in_has_the_attributes_of_lightly_s_own_instance(name: str) -> None:
    ours, theirs = (getattr(where, name)(**LIGHTLY[name]) for where in (lightly, published()))
    parts = {"": (ours, theirs)}
    for inside in ("center", "last_layer"):
        if isinstance(getattr(theirs, inside, None), nn.Module):
            parts[inside] = getattr(ours, inside), getattr(theirs, inside)
    for place, (one, other) in parts.items():
        names = public_names(other)
        assert names
        for attribute in names:
            expected = getattr(other, attribute)
            if isinstance(expected, nn.Parameter) or attribute == "weight":
                expected = tuple(expected.shape)
            assert_value(getattr(one, attribute), CALL if callable(expected) else expected, f"{place}.{attribute}")


def test_an_attribute_that_lacks_is_found() -> None:
    """Negative control."""
    with pytest.raises(AttributeError, match="output_dim"):
        assert_value(part(make_dino(), "output_dim"), K, "output_dim")
    with pytest.raises(AssertionError):
        assert_value(make_dino(student_temp=0.2).student_temp, 0.1, "student_temp")
