"""Sums over a teacher without its centre, which a backend may form in the loss's own pass over the teacher.

A centre of probabilities needs the teacher's probabilities without the centre, whose products with the prototypes are those of
the target. A backend that finds the question on the target's bias may answer it; if none does, the centre takes its own passes.
The answer is used only in the call of the loss that asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmf_kernels.tensors import has_memory

ATTRIBUTE = (
    "_vmf_kernels_uncentered"  # of the bias, which stays the same object in torch's dispatcher, and of the teacher
)
# nats: the sums are taken from logits with the bias, so a larger one would cost them more than 6e-5 nats in fp32
MOST_BIAS = 2.0**10


@dataclass(eq=False)
class UncenteredSums:
    """A question, and its answer.

    Attributes:
        temperature: of the teacher, as the loss was given it.
        total: [K] nats ``log sum_t softmax(l_t)_k`` over the teacher's rows, with the logits ``l`` over temperature and their
            vMF normaliser but without the bias; None until a backend has formed it.
    """

    temperature: float | Tensor
    total: Tensor | None = None


def ask_for_sums(bias_K: Tensor, teacher: Any, temperature: float | Tensor) -> Tensor:
    """The bias with a question about ``teacher`` on it, for a backend; the bias itself if nobody could answer.

    Args:
        bias_K: minus a centre, nats.
        teacher: unstored logits of the target; they hold the question as well.
        temperature: of the teacher.
    """
    if not has_memory(bias_K) or not has_memory(teacher.features):
        return bias_K
    own = bias_K.detach()  # a new object: a rule may return a tensor that it keeps
    question = UncenteredSums(temperature)
    setattr(own, ATTRIBUTE, question)
    vars(teacher)[ATTRIBUTE] = question
    return own


def question_on(bias_K: Tensor | None) -> UncenteredSums | None:
    """The question on a target's bias, for a backend that can answer it to the rounding of its logits; else None."""
    question: UncenteredSums | None = getattr(bias_K, ATTRIBUTE, None)
    if question is None or bias_K is None:
        return None
    return question if float(bias_K.abs().max()) <= MOST_BIAS else None  # not with NaN either


def answer_about(teacher: Any, temperature: float | Tensor | None) -> Tensor | None:
    """[K] the sums that a backend has formed, once; None if it has not, or for another temperature."""
    question: UncenteredSums | None = vars(teacher).pop(ATTRIBUTE, None)
    same = question is not None and (question.temperature is temperature or _equal(question.temperature, temperature))
    return question.total if question is not None and same else None


def _equal(one: float | Tensor, other: float | Tensor | None) -> bool:
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
