"""The loss on stored logits in plain torch: images are processed in chunks that fit the cache.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.base_two import LN_2, LOG2_E
from vmf_kernels.backends.stored.contract import Side, StoredInputs, Sums
from vmf_kernels.prototypes import accumulation_dtype

CHUNK_BYTES = 8 * 2**20  # of logits at once: a few such copies stay in a 32 MiB L3


class _Logits(NamedTuple):
    """One network's stored logits, with the scale and bias that turn them into base-2 log-probabilities."""

    rows: Tensor  # [views, B, K]
    scale: Tensor  # [] log2(e) / tau
    bias: Tensor | None  # [K], base 2

    @classmethod
    def of(cls, side: Side, views: int, dtype: torch.dtype) -> _Logits:
        # the lowest finite number, not -inf: its product with a zero probability would be NaN
        lowest = torch.finfo(dtype).min
        scaled = None if side.bias is None else (side.bias.reshape(-1).to(dtype) * LOG2_E).clamp(min=lowest)
        return cls(_by_view(side.logits, views), (LOG2_E / side.temperature).to(dtype), scaled)

    def chunk(self, images: slice) -> Tensor:
        """[b, views, K] base-2 logits of some images, a new tensor."""
        out = self.rows[:, images].transpose(0, 1).to(self.scale.dtype, copy=True).mul_(self.scale)
        return out if self.bias is None else out.add_(self.bias)


class _Softmax(NamedTuple):
    """Softmax of a chunk over its last dim, in the form that the loss needs; base 2."""

    deviation: Tensor  # [b, views, K] logits minus their maximum
    unnormalized: Tensor  # [b, views, K] 2^deviation
    mass: Tensor  # [b, views] sum of unnormalized
    log_sum_exp: Tensor  # [b, views]

    @classmethod
    def of(cls, logits: Tensor) -> _Softmax:
        top = logits.amax(dim=-1, keepdim=True)
        deviation = logits.sub_(top)
        unnormalized = deviation.exp2()
        mass = unnormalized.sum(dim=-1)
        return cls(deviation, unnormalized, mass, top.squeeze(-1) + mass.log2())

    def entropy(self) -> Tensor:
        """[b, views] nats."""
        spread: Tensor = torch.linalg.vecdot(self.unnormalized, self.deviation)
        nats: Tensor = (self.mass.log2() - spread / self.mass) * LN_2
        return nats


def _by_view(rows: Tensor, views: int) -> Tensor:
    """[views, B, K] view of [views * B, K] rows, whatever their strides."""
    return rows.view(views, rows.shape[0] // views, rows.shape[1])


def _image_chunks(images: int, row_bytes: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // max(row_bytes, 1))
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))


class StreamingStored:
    """``contract.StoredBackend`` in torch, for any device, floating dtype and strides."""

    def unsupported(self, inputs: StoredInputs) -> str | None:
        """None: everything is supported."""
        return None

    def forward(self, inputs: StoredInputs) -> Sums:
        """See ``contract.StoredBackend``."""
        view_weights, weight_B = inputs.view_weights, inputs.image_weights
        (teacher_views, views), count = view_weights.shape, inputs.student.logits.shape[1]
        student, teacher, dtype = _networks(inputs)
        images = student.rows.shape[1]
        sums = torch.zeros(3, dtype=torch.float64, device=view_weights.device)
        usage = view_weights.new_zeros(count)
        student_lse, teacher_lse = usage.new_empty(images, views), usage.new_empty(images, teacher_views)
        for chunk in _image_chunks(images, (views + teacher_views) * count * dtype.itemsize):
            s, t = _Softmax.of(student.chunk(chunk)), _Softmax.of(teacher.chunk(chunk))
            q = t.unnormalized / t.mass[..., None]
            # log p relative to the row's maximum, so that a common offset of the row has no effect
            cross = s.mass.log2()[:, None, :] - q @ s.deviation.transpose(1, 2)
            weight_bGV = weight_B[chunk, None, None] * view_weights
            teacher_mass, student_mass = weight_bGV.sum(dim=2), weight_bGV.sum(dim=1)
            entropies = (teacher_mass * t.entropy()).sum(), (student_mass * s.entropy()).sum()
            sums += torch.stack([(weight_bGV * cross).sum() * LN_2, *entropies])
            usage += teacher_mass.reshape(-1) @ q.reshape(-1, count)
            student_lse[chunk], teacher_lse[chunk] = s.log_sum_exp, t.log_sum_exp
        return Sums(sums, usage, student_lse, teacher_lse)

    def backward(
        self, inputs: StoredInputs, loss_gradient: Tensor, student_lse: Tensor, teacher_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``contract.StoredBackend``."""
        view_weights, logits, bias = inputs.view_weights, inputs.student.logits, inputs.student.bias
        (teacher_views, views), count = view_weights.shape, logits.shape[1]
        student, teacher, dtype = _networks(inputs)
        # scaled in fp32 before the cast: under a GradScaler the unscaled gradient would underflow in fp16
        weight_B = inputs.image_weights * loss_gradient.to(dtype)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        by_view = _by_view(gradient, views)
        bias_gradient = view_weights.new_zeros(count)
        for chunk in _image_chunks(weight_B.shape[0], (views + teacher_views) * count * dtype.itemsize):
            p = student.chunk(chunk).sub_(student_lse[chunk, :, None]).exp2_()
            q = teacher.chunk(chunk).sub_(teacher_lse[chunk, :, None]).exp2_()
            p.mul_(view_weights.sum(dim=0)[:, None]).sub_(view_weights.T @ q).mul_(weight_B[chunk, None, None])
            if bias is not None:
                bias_gradient += p.sum(dim=(0, 1))
            by_view[:, chunk] = p.mul_(inputs.student.temperature.to(dtype).reciprocal()).transpose(0, 1)
        return gradient, bias_gradient


def _networks(inputs: StoredInputs) -> tuple[_Logits, _Logits, torch.dtype]:
    """Both networks' logits, and the dtype of the sums."""
    teacher_views, views = inputs.view_weights.shape
    dtype = accumulation_dtype(inputs.student.logits.dtype)
    return _Logits.of(inputs.student, views, dtype), _Logits.of(inputs.teacher, teacher_views, dtype), dtype
