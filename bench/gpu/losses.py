"""The measured variants of this library: the operator, the loss on stored logits of a plain head, and ``DINOLoss``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from bench.baselines import BASELINES
from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs, HeadShape
from vmf_bench.ours import ours, stored_logits
from vmf_bench.peers.peer import Compile, Loss
from vmf_kernels import (
    DINOLoss,
    PrototypeLogits,
    weight_norm_prototypes,
    weight_norm_vmf_prototypes,
)
from vmf_kernels.backends.choice import BACKENDS

MOST_STREAMING_ROWS = 1280  # plain torch: minutes of no interest beyond
OURS = "ours"
BESIDE = {"triton": "cuda", "cuda": "triton"}  # the library's other backend on a GPU, measured beside the one asked for
SAME_KERNELS = (OURS, "ours vMF", "DINOLoss")  # where one of them crashes the others will


class Variant(NamedTuple):
    """A loss to measure."""

    title: str
    prepare: Callable[[HeadInputs, Compile], Loss]
    is_ours: bool = True
    same_loss: bool = True  # as the others of its workload: checked before it is timed
    omits_teacher_entropy: bool = False


class Wanted(NamedTuple):
    """What to measure on a workload."""

    variants: tuple[str, ...] | None  # None: all
    kernels: bool = False  # of ours, by a profile, which takes seconds


ALL = Wanted(None)
QUICK = Wanted(("B1", OURS, *BESIDE))  # what needs no compilation


def prepare_beside(inputs: HeadInputs, backend: str) -> Loss:
    """The operator on the backend that was not asked for.

    Raises:
        UnavailableError: it cannot run here; says why.
    """
    reason = BACKENDS[backend].unsupported(inputs.student_features, inputs.student_direction)
    if reason is not None:
        raise UnavailableError(reason)
    return ours(backend)


def prepare_module(inputs: HeadInputs, backend: str) -> Loss:
    """``DINOLoss`` as users call it, its own centre moved at each call."""
    shape, tau = inputs.shape, inputs.teacher_temperature
    module = DINOLoss(shape.prototypes, shape.student_views, tau, tau, 0, 1, backend=backend).to(inputs.center.device)

    def loss(inputs: HeadInputs) -> Tensor:
        student = weight_norm_prototypes(inputs.student_magnitude, inputs.student_direction)
        teacher = weight_norm_prototypes(inputs.teacher_magnitude, inputs.teacher_direction)
        logits = PrototypeLogits(inputs.student_features, student), PrototypeLogits(inputs.teacher_features, teacher)
        value: Tensor = module(*logits, 0)
        return value

    return loss


def variants(backend: str, shape: HeadShape) -> dict[str, Variant]:
    """Everything to measure on a workload, the most telling first: B1, ours, the other rivals, and ours in other ways.

    B1 runs anywhere: whatever ours does to the device, there is something to compare with.
    """
    rivals = {
        name: Variant(b.title, b.prepare, is_ours=False, omits_teacher_entropy=b.omits_teacher_entropy)
        for name, b in BASELINES.items()
    }
    first = {"B1": rivals.pop("B1"), OURS: Variant(f"operator, {backend}", lambda inputs, compile_: ours(backend))}
    if (other := BESIDE.get(backend)) is not None:
        first[other] = Variant(f"operator, {other}", lambda inputs, compile_: prepare_beside(inputs, other))
    return first | rivals | other_ways(backend, shape)


def other_ways(backend: str, shape: HeadShape) -> dict[str, Variant]:
    """Further variants: with the normaliser, as a module, in plain torch, and with a plain head."""
    mine = {
        "ours vMF": Variant(
            f"operator, {backend}, vMF normaliser",
            lambda inputs, compile_: ours(backend, weight_norm_vmf_prototypes),
            same_loss=False,
        )
    }
    if not shape.matched:
        mine["DINOLoss"] = Variant(
            f"DINOLoss, {backend}", lambda inputs, compile_: prepare_module(inputs, backend), same_loss=False
        )
    if shape.student_rows <= MOST_STREAMING_ROWS and backend != "streaming":
        mine["streaming"] = Variant("operator, plain torch", lambda inputs, compile_: ours("streaming"))
    mine["logits"] = Variant("logit_cross_entropy behind a plain head", lambda inputs, compile_: stored_logits)
    return mine
