"""Everything that is checked and timed: this library's backends, and the losses of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from vmf_bench.errors import BenchError, UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_bench.ours import ours, stored_logits
from vmf_bench.peers.peer import Compile, Loss
from vmf_bench.peers.table import PEERS

BASELINE = "published"  # what speed-ups are relative to
ON_GPU = ("triton", "cuda")  # backends; under Triton's interpreter a step on a CPU would take minutes
REFUSAL = "cannot run here: "  # of the library, before its reason


class Variant(NamedTuple):
    """A loss to check and to time."""

    title: str
    prepare: Callable[[HeadInputs, Compile], Loss]  # raises ``UnavailableError``
    is_ours: bool = True
    timed: bool = True
    omits_teacher_entropy: bool = False
    compiles: bool = False
    multiplies_16_bits: bool = False  # by torch.mm: where the processor has no such products, a step takes minutes


def prepare_backend(name: str) -> Callable[[HeadInputs, Compile], Loss]:
    """The operator on a backend, if it runs on such tensors."""

    def prepare(inputs: HeadInputs, compile_: Compile) -> Loss:
        if name in ON_GPU and inputs.device.type != "cuda":
            raise UnavailableError("it needs an NVIDIA GPU")
        loss = ours(name)
        try:
            with torch.no_grad():
                loss(one_image_of(inputs))
        except RuntimeError as error:
            if REFUSAL not in str(error):
                raise
            raise UnavailableError(str(error).split(REFUSAL, 1)[1]) from error
        return loss

    return prepare


def one_image_of(inputs: HeadInputs) -> HeadInputs:
    """The same prototypes with the rows of the first image alone."""
    shape = inputs.shape
    student = inputs.student_features.detach().view(shape.student_views, shape.images, -1)[:, 0]
    teacher = inputs.teacher_features.view(shape.teacher_views, shape.images, -1)[:, 0]
    return replace(
        inputs,
        shape=replace(shape, images=1),
        student_features=student.contiguous(),
        teacher_features=teacher.contiguous(),
        image_weights=inputs.image_weights[:1],
    )


OURS = {
    "native": Variant("native, C++ on CPUs", prepare_backend("native")),
    "triton": Variant("triton, on NVIDIA GPUs", prepare_backend("triton")),
    "cuda": Variant("cuda, on NVIDIA GPUs of compute capability 9.0", prepare_backend("cuda")),
    "streaming": Variant("streaming, plain torch", prepare_backend("streaming")),
    "stored-logits": Variant(
        "logit_cross_entropy behind a plain head", lambda inputs, compile_: stored_logits, multiplies_16_bits=True
    ),
    "reference": Variant("reference, the dense formula", prepare_backend("reference"), timed=False),
}
VARIANTS = OURS | {
    name: Variant(
        peer.title,
        peer.prepare,
        is_ours=False,
        omits_teacher_entropy=peer.omits_teacher_entropy,
        compiles=peer.compiles,
        multiplies_16_bits=True,
    )
    for name, peer in PEERS.items()
}


def chosen(only: Sequence[str] | None) -> dict[str, Variant]:
    """The variants of these names and the baseline; all for None.

    Raises:
        BenchError: a name is unknown.
    """
    if only is None:
        return VARIANTS
    unknown = [name for name in only if name not in VARIANTS]
    if unknown:
        raise BenchError(f"--only got {unknown[0]!r}; expected some of {', '.join(VARIANTS)}.")
    return {name: variant for name, variant in VARIANTS.items() if name in only or name == BASELINE}
