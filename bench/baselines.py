"""B1 to B6: the same loss and gradients from the same ``HeadInputs``, computed without this library.

B1 is the published loss with its last layer; B2 the same compiled; B3 row chunks that fit the L2 cache, compiled, once with
recompute and once with gradients formed in the forward pass; B4 attention to the prototypes; B5 torch's own loss on stored
teacher probabilities; B6 Liger's chunked distillation loss. Products are in bf16, softmaxes in fp32, as autocast has them.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench.workloads import HeadInputs
from tests.published import mean_over_pairs

Loss = Callable[[HeadInputs], Tensor]  # differentiable in ``HeadInputs.leaves``
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

CPU_CACHE_BYTES = 32 * 2**20  # stands for the L2 where there is no GPU
CACHE_SHARE = 0.8  # of the L2 for the chunk's bf16 logits; the rest for prototypes on their way through
SMALL_FLEX_TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32}
LEAST_VALUE_DIM = 16  # flex_attention takes no narrower values
LIGER_CHUNK_ROWS = 1024  # its default


class UnavailableError(RuntimeError):
    """The baseline cannot run here; the message says why."""


class Baseline(NamedTuple):
    """A way to compute the loss."""

    title: str
    prepare: Callable[[HeadInputs, Compile], Loss]
    omits_teacher_entropy: bool = False  # its value is KL(q, p): the same gradients, another constant


def effective_weights(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """[K, D] fp32 prototypes of student and teacher, by torch's own weight norm."""
    student = torch._weight_norm(inputs.student_direction, inputs.student_magnitude, 0)
    with torch.no_grad():
        return student, torch._weight_norm(inputs.teacher_direction, inputs.teacher_magnitude, 0)


def published(inputs: HeadInputs) -> Tensor:
    """B1 with a fixed centre: with multi-crop views, every pair has its own log-softmax, as published."""
    device = inputs.student_features.device.type
    with torch.autocast(device, torch.bfloat16):
        student_weight, teacher_weight = effective_weights(inputs)
        student = functional.linear(inputs.student_features, student_weight) / inputs.student_temperature
        with torch.no_grad():
            teacher = functional.linear(inputs.teacher_features, teacher_weight)
            targets = ((teacher - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)
        if not inputs.shape.matched:
            return mean_over_pairs(student, targets, inputs.shape.student_views)
        return (inputs.image_weights * torch.sum(-targets * student.log_softmax(dim=-1), dim=-1)).sum()


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
    """Slices of the images whose bf16 logits fit a share of the cache, of nearly equal sizes."""
    shape = inputs.shape
    bytes_of_an_image = 2 * shape.prototypes * (shape.student_views + shape.teacher_views)
    most = max(int(CACHE_SHARE * cache_bytes / bytes_of_an_image), 1)
    size = math.ceil(shape.images / math.ceil(shape.images / most))
    return (slice(start, start + size) for start in range(0, shape.images, size))


def cache_bytes_of(device: torch.device) -> int:
    """Size of the last-level cache of a GPU, or a stand-in."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES


def by_view(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Student rows [V, B, D] and teacher rows [G, B, D]."""
    shape = inputs.shape
    student = inputs.student_features.view(shape.student_views, shape.images, shape.dim)
    return student, inputs.teacher_features.view(shape.teacher_views, shape.images, shape.dim)


def prepare_recomputed_chunks(inputs: HeadInputs, compile_: Compile) -> Loss:
    """B3: the backward pass computes each chunk again; nothing is kept for it."""
    chunk, cache = compile_(chunk_loss), cache_bytes_of(inputs.student_features.device)

    def loss(inputs: HeadInputs) -> Tensor:
        student_weight, teacher_weight = (w.to(torch.bfloat16) for w in effective_weights(inputs))
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
        weights = student_weight.to(torch.bfloat16), teacher_weight.to(torch.bfloat16)
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
    """B3 without recompute: each chunk's gradients are computed while its probabilities are in the cache."""
    rest = compile_(chunk_gradients), cache_bytes_of(inputs.student_features.device)

    def loss(inputs: HeadInputs) -> Tensor:
        weights = effective_weights(inputs)
        total: Tensor = _GradientsInForward.apply(  # type: ignore[no-untyped-call]
            inputs.student_features, *weights, (inputs, *rest)
        )
        return total

    return loss


def attention(inputs: HeadInputs, bias_K: Tensor, options: dict[str, int] | None) -> Tensor:
    """B4: barycentres as attention of teacher rows to the prototypes, and the student's log-sum-exp as another.

    The student's values are zeros of the least width: its gradient comes from the log-sum-exp alone.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    student_weight, teacher_weight = (w.to(torch.bfloat16)[None, None] for w in effective_weights(inputs))

    def add_bias(score: Tensor, _batch: Tensor, _head: Tensor, _row: Tensor, prototype: Tensor) -> Tensor:
        return score + bias_K[prototype]

    barycentres: Any = flex_attention(
        inputs.teacher_features[None, None],
        teacher_weight,
        student_weight,
        score_mod=add_bias,
        scale=1 / inputs.teacher_temperature,
        kernel_options=options,  # type: ignore[arg-type]
    )
    no_values = student_weight.new_zeros(1, 1, student_weight.shape[2], LEAST_VALUE_DIM)
    out: Any = flex_attention(
        inputs.student_features[None, None],
        student_weight,
        no_values,
        scale=1 / inputs.student_temperature,
        kernel_options=options,  # type: ignore[arg-type]
        return_aux=AuxRequest(lse=True),
    )
    lse_VB = out[1].lse.view(inputs.shape.student_views, inputs.shape.images)
    mass_VB = inputs.pair_weights.sum(dim=0)[:, None] * inputs.image_weights
    student = inputs.student_features.view(inputs.shape.student_views, inputs.shape.images, -1).float()
    pulled = student * inputs.image_weights[:, None] / inputs.student_temperature
    targets = barycentres.view(inputs.shape.teacher_views, inputs.shape.images, -1).float()
    carried = torch.einsum("gv,gbd->vbd", inputs.pair_weights, targets)
    total: Tensor = (mass_VB * lse_VB).sum() - (carried * pulled).sum()
    return total


def prepare_attention(inputs: HeadInputs, compile_: Compile) -> Loss:
    """B4 with torch's tiles, or with small ones where those do not fit the GPU's shared memory."""
    if inputs.student_features.device.type != "cuda":
        raise UnavailableError("flex_attention has no backward pass on the CPU")
    refusals = []
    for options in (None, SMALL_FLEX_TILES):
        compiled = compile_(attention)

        def loss(
            inputs: HeadInputs, compiled: Callable[..., Tensor] = compiled, options: dict[str, int] | None = options
        ) -> Tensor:
            value: Tensor = compiled(inputs, inputs.teacher_bias, options)
            return value

        try:
            loss(inputs).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # what torch refuses is the finding, and goes into the record
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            refusals.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
            continue
        finally:
            inputs.clear_gradients()
        return loss
    raise UnavailableError("flex_attention refuses these sizes. " + " | with small tiles: ".join(refusals))


def prepare_linear_cross_entropy(inputs: HeadInputs, compile_: Compile) -> Loss:
    """B5: probabilities of the teacher are stored, [S, K] in bf16, and each student row has one weighted target."""
    linear_cross_entropy = getattr(functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if linear_cross_entropy is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")

    def loss(inputs: HeadInputs) -> Tensor:
        student_weight, teacher_weight = (w.to(torch.bfloat16) for w in effective_weights(inputs))
        mass_VB = inputs.pair_weights.sum(dim=0)[:, None] * inputs.image_weights
        targets = _stored_targets(inputs, teacher_weight, mass_VB)
        rows = inputs.student_features / inputs.student_temperature
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*options.* ignored")
            by_row = linear_cross_entropy(rows, student_weight, targets, reduction="none", options=options())
        total: Tensor = (mass_VB.flatten() * by_row.float()).sum()
        return total

    try:
        with torch.no_grad():
            loss(inputs)
    except UserWarning as refusal:
        reason = f"linear_cross_entropy of torch {torch.__version__} does not chunk probability targets"
        raise UnavailableError(reason) from refusal
    return loss


@torch.no_grad()
def _stored_targets(inputs: HeadInputs, teacher_weight: Tensor, mass_VB: Tensor) -> Tensor:
    teacher = functional.linear(by_view(inputs)[1], teacher_weight).float()
    q_GBK = ((teacher - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)
    targets_VBK = torch.einsum("gv,gbk->vbk", inputs.pair_weights, q_GBK) * inputs.image_weights[:, None]
    return (targets_VBK / mass_VB[..., None]).flatten(0, 1).to(torch.bfloat16)


def prepare_liger(inputs: HeadInputs, compile_: Compile) -> Loss:
    """B6: Liger's chunked JSD at beta 0, KL(q, p), on one row a pair; temperatures are folded into the rows."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnavailableError("liger_kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    shape, device = inputs.shape, inputs.student_features.device
    pairs = inputs.pair_weights.nonzero().tolist()
    if (
        len({inputs.pair_weights[g, v].item() for g, v in pairs}) > 1
        or inputs.image_weights.ne(inputs.image_weights[0]).any()
    ):
        raise UnavailableError("Liger's loss weights all rows alike, and these pairs differ")
    scale = inputs.pair_weights.sum() * inputs.image_weights.sum()
    labels = torch.zeros(len(pairs) * shape.images, dtype=torch.long, device=device)
    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0, compiled=compile_ is not eager, chunk_size=LIGER_CHUNK_ROWS
    )

    def loss(inputs: HeadInputs) -> Tensor:
        student_weight, teacher_weight = (w.to(torch.bfloat16) for w in effective_weights(inputs))
        student, teacher = by_view(inputs)
        rows_S = torch.cat([student[v] for _, v in pairs]) / inputs.student_temperature
        rows_T = torch.cat([teacher[g] for g, _ in pairs]) / inputs.teacher_temperature
        bias_K = inputs.teacher_bias.to(torch.bfloat16)
        mean: Tensor = jsd(rows_S, student_weight, rows_T, teacher_weight, labels, None, bias_K)
        return scale * mean

    return loss


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """A ``Compile`` that does not compile."""
    return function


BASELINES = {
    "B1": Baseline("published loss, eager", lambda inputs, compile_: published),
    "B2": Baseline("published loss, compiled", lambda inputs, compile_: compile_(published)),
    "B3": Baseline("row chunks in L2, compiled, recompute", prepare_recomputed_chunks),
    "B3g": Baseline("row chunks in L2, compiled, gradients in forward", prepare_gradient_chunks),
    "B4": Baseline("two compiled flex_attention calls", prepare_attention),
    "B5": Baseline("torch linear_cross_entropy on stored targets", prepare_linear_cross_entropy),
    "B6": Baseline("Liger chunked distillation loss", prepare_liger, omits_teacher_entropy=True),
}
