"""Row chunks whose logits fit a cache, compiled: with recompute, and with gradients formed in the forward pass.

The cache is the L2 of a GPU. On a CPU it is 32 MiB, of the size of an L3, whatever the processor has.

Legend: V / G student / teacher views, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Compile, Loss, by_view, effective_weights, product_weights

CPU_CACHE_BYTES = 32 * 2**20  # of an L3; torch does not tell what a processor has
CACHE_SHARE = 0.8  # of the cache for the chunk's logits; the rest for prototypes on their way through


def chunk_terms(
    rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], inputs: HeadInputs, image_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [V, B, K] of the student and their weighted targets [V, B, K] for some of the images.

    Args:
        rows: features [V, B, D] and [G, B, D].
        weights: prototypes of both networks, [K, D] in the features' dtype.
        inputs: centre, pair weights and temperatures.
        image_weights: [B].
    """
    student, teacher = (functional.linear(x, w).float() for x, w in zip(rows, weights, strict=True))
    log_p = (student / inputs.student_temperature).log_softmax(dim=-1)
    q = ((teacher - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)
    pairs_GVB11 = inputs.pair_weights[:, :, None, None] * image_weights[:, None]
    return log_p, (pairs_GVB11 * q.detach()[:, None]).sum(dim=0)


def chunk_loss(
    rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], inputs: HeadInputs, image_weights: Tensor
) -> Tensor:
    """[] loss of some of the images; arguments as ``chunk_terms``."""
    log_p, targets = chunk_terms(rows, weights, inputs, image_weights)
    return -(targets * log_p).sum()


def chunk_gradients(
    rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], inputs: HeadInputs, image_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same loss, and its gradients at the student's rows [V, B, D] and prototypes [K, D]."""
    log_p, targets = chunk_terms(rows, weights, inputs, image_weights)
    mass_VB1 = (inputs.pair_weights.sum(dim=0)[:, None] * image_weights)[..., None]
    at_logits = ((mass_VB1 * log_p.exp() - targets) / inputs.student_temperature).to(weights[0].dtype)
    by_row = at_logits.flatten(0, 1)
    return -(targets * log_p).sum(), at_logits @ weights[0], by_row.T @ rows[0].flatten(0, 1)


def chunks_of_images(inputs: HeadInputs, cache_bytes: int) -> Iterator[slice]:
    """Slices of the images whose logits fit a share of the cache, of nearly equal sizes."""
    shape = inputs.shape
    bytes_of_an_image = inputs.dtype.itemsize * shape.prototypes * (shape.student_views + shape.teacher_views)
    most = max(int(CACHE_SHARE * cache_bytes / bytes_of_an_image), 1)
    size = math.ceil(shape.images / math.ceil(shape.images / most))
    return (slice(start, start + size) for start in range(0, shape.images, size))


def cache_bytes_of(device: torch.device) -> int:
    """Size of the L2 of a GPU; ``CPU_CACHE_BYTES`` on a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES


def prepare_recomputed_chunks(inputs: HeadInputs, compile_: Compile) -> Loss:
    """The backward pass computes each chunk again; nothing is kept for it."""
    chunk, cache = compile_(chunk_loss), cache_bytes_of(inputs.student_features.device)

    def loss(inputs: HeadInputs) -> Tensor:
        student_weight, teacher_weight = product_weights(inputs)
        (student, teacher), total = by_view(inputs), inputs.center.new_zeros(())
        for images in chunks_of_images(inputs, cache):
            rows = student[:, images], teacher[:, images]
            arguments = rows, (student_weight, teacher_weight), inputs, inputs.image_weights[images]
            total = total + checkpoint(chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        return total

    return loss


class _GradientsInForward(torch.autograd.Function):
    """Sum of ``chunk_gradients`` over the chunks, the prototypes' gradient summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, student_weight: Tensor, teacher_weight: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        inputs, chunk, cache = rest
        total: Tensor = inputs.center.new_zeros(())
        weights = student_weight.to(features.dtype), teacher_weight.to(features.dtype)
        student, teacher = by_view(inputs)
        features_grad, weight_grad = torch.empty_like(student), torch.zeros_like(student_weight)
        for images in chunks_of_images(inputs, cache):
            rows = student[:, images].detach(), teacher[:, images]
            loss, at_rows, at_weight = chunk(rows, weights, inputs, inputs.image_weights[images])
            total += loss
            features_grad[:, images] = at_rows
            weight_grad += at_weight
        ctx.save_for_backward(features_grad.flatten(0, 1), weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        features_grad, weight_grad = ctx.saved_tensors
        # in place, as one backward pass is all there is
        return features_grad.mul_(loss_grad.to(features_grad.dtype)), weight_grad.mul_(loss_grad), None, None


def prepare_gradient_chunks(inputs: HeadInputs, compile_: Compile) -> Loss:
    """Each chunk's gradients are computed while its probabilities are in the cache."""
    rest = compile_(chunk_gradients), cache_bytes_of(inputs.student_features.device)

    def loss(inputs: HeadInputs) -> Tensor:
        weights = effective_weights(inputs)
        total: Tensor = _GradientsInForward.apply(  # type: ignore[no-untyped-call]
            inputs.student_features, *weights, (inputs, *rest)
        )
        return total

    return loss
