"""The tensors of a case: values that are easy or awkward, in memory that is contiguous or not.

Numbers are drawn in fp64, then rounded to the case's dtype, then laid out; so one seed gives the same numbers in each layout.

Legend: R rows of either network, K prototypes, D embedding dim, G / V teacher / student views, B images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.fuzz.cases import Case
from vmf_kernels import Prototypes

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_FINITE = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
DENORMAL = 1e-40  # of fp32
HUGE, TINY = 1e4, 1e-30


@dataclass(frozen=True)
class Source:
    """Draws the tensors of one case, always in the same order."""

    case: Case
    random: torch.Generator

    @classmethod
    def of(cls, case: Case) -> Source:
        return cls(case, torch.Generator().manual_seed(case.seed))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.random)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return torch.rand(*shape, dtype=torch.float64, generator=self.random)

    def some(self, *shape: int) -> Tensor:
        """Booleans, about a third true, at least one if there is one."""
        chosen = self.uniform(*shape) < 1 / 3
        if chosen.numel():
            chosen.view(-1)[int(self.uniform(1) * chosen.numel())] = True
        return chosen

    def rows(self, count: int, prototypes_KD: Tensor) -> Tensor:
        """[R, D] features near prototypes or not, as ``case.rows`` says."""
        word, dim = self.case.rows, prototypes_KD.shape[1]
        unit = normalize(self.normal(count, dim), dim=1)
        picked = (self.uniform(count) * len(prototypes_KD)).long()
        if word == "at_prototypes":
            unit = normalize(prototypes_KD.double().nan_to_num(posinf=1.0), dim=1)[picked]
        return self.stored(self.changed(unit, word), self.case.dtype)

    def changed(self, unit_RD: Tensor, word: str) -> Tensor:
        """Rows of norm 1 that become what ``word`` says."""
        count = len(unit_RD)
        lengths: dict[str, Tensor | float] = {
            "free": self.normal(count, 1).exp(),
            "huge": HUGE,
            "tiny": TINY,
            "denormal": DENORMAL,
            "zero": 0.0,
        }
        if word in lengths:
            return unit_RD * lengths[word]
        if word == "spread":
            return unit_RD * 10 ** (8 * self.uniform(count, 1) - 4)
        if word == "some_zero":
            return unit_RD.masked_fill(self.some(count, 1), 0.0)
        if word in ("identical", "duplicates") and count:
            kept = 1 if word == "identical" else max(count // 2, 1)
            return unit_RD[torch.arange(count) % kept]
        if (word == "spike" or word in NOT_FINITE) and count:
            spoilt = unit_RD.clone()
            at = int(self.uniform(1) * unit_RD.numel())
            spoilt.view(-1)[at] = NOT_FINITE.get(word, HUGE)
            return spoilt
        return unit_RD

    def prototypes(self, dim: int) -> Prototypes:
        """K prototypes of the case's kind; under weight norm ``case.norms`` is about the magnitudes, and zeros are in both."""
        count, kind, word = self.case.prototypes, self.case.kind, self.case.norms
        unit = normalize(self.normal(count, dim), dim=1)
        dtype = self.case.dtype if self.case.stored == "same" else self.case.stored
        if not kind.startswith("weight_norm"):
            return Prototypes(self.stored(self.changed(unit, word), dtype), None, kind)
        sign = torch.where(self.uniform(count, 1) < 0.5, -1.0, 1.0)
        magnitude = self.changed(sign, word)
        direction = unit * (0.1 + 5 * self.uniform(count, 1))
        if word in ("some_zero", "duplicates"):
            direction = self.changed(direction, word)
        return Prototypes(self.stored(direction, dtype), self.stored(magnitude, dtype), kind)

    def logits(self, count: int) -> Tensor:
        """[R, K] stored logits, as ``case.rows`` says: of the size that unit rows and prototypes give, over temperature 0.1."""
        word, width = self.case.rows, self.case.prototypes
        values = self.normal(count, width)
        if word == "at_prototypes":  # here: ties
            values = values.round()
        elif word == "spread":
            values = values * 10 ** (4 * self.uniform(count, 1) - 2)
        else:
            values = self.changed(values, word)
        return self.stored(values, self.case.dtype)

    def bias(self) -> Tensor | None:
        """[K] nats of the teacher, or None."""
        word, count = self.case.bias, self.case.prototypes
        if word == "none":
            return None
        values = self.normal(count)
        if word == "huge":
            values = values * HUGE
        elif word == "one":
            values[int(self.uniform(1) * count)] += 1e3
        elif word in NOT_FINITE and (
            count > 1 or word == "nan"
        ):  # what is left where -inf leaves out all is nobody's question
            values[int(self.uniform(1) * count)] = NOT_FINITE[word]
        return self.stored(values, "fp64" if self.case.dtype == "fp64" else "fp32")

    def pair_weights(self) -> Tensor:
        """[G, V] fp64."""
        views, word = (self.case.teacher_views, self.case.student_views), self.case.pairs
        weights = self.uniform(*views) / max(self.case.images * views[0] * views[1], 1)
        if word == "ones":
            return torch.ones_like(weights)
        if word == "different":
            return weights.fill_diagonal_(0.0)
        if word == "one_hot":
            return torch.zeros_like(weights).view(-1).index_fill(0, torch.tensor([0]), 1.0).view(views)
        if word == "zero":
            return torch.zeros_like(weights)
        if word == "some_zero":
            return weights.masked_fill(self.some(*views), 0.0)
        return weights * {"tiny": 1e-20, "large": 1e4}.get(word, 1.0)

    def image_weights(self) -> Tensor | None:
        """[B] fp64, or None."""
        word, images = self.case.weights, self.case.images
        if word == "none":
            return None
        weights = 0.5 + self.uniform(images)
        if word == "some_zero":
            return weights.masked_fill(self.some(images), 0.0)
        return torch.zeros_like(weights) if word == "zero" else weights

    def stored(self, values: Tensor, dtype: str) -> Tensor:
        """The values in a dtype and in the case's layout."""
        return laid_out(values.to(DTYPES[dtype]), self.case.layout)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory; "expanded" repeats the first row by a stride of 0."""
    if layout == "transposed":
        return values.mT.contiguous().mT if values.ndim > 1 else values
    if layout == "sliced":  # every other element of larger memory, whose rest is NaN
        room = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan)
        room[..., 1::2] = values
        return room[..., 1::2]
    if layout == "offset":  # not aligned to any vector
        room = values.new_full((values.numel() + 1,), torch.nan)
        room[1:] = values.reshape(-1)
        return room[1:].view(values.shape)
    if layout == "negated":  # stored with the other sign, as the imaginary part of a conjugate
        return torch._neg_view(-values)
    if layout == "expanded" and values.ndim > 1 and len(values):
        return values[:1].expand(values.shape)
    return values


def is_finite(*tensors: Tensor | None) -> bool:
    """Whether no element of any of them is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)
