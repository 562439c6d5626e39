"""flex_attention: prototypes as keys and values of two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Compile, Loss, product_weights

SMALL_FLEX_TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32}
LEAST_VALUE_DIM = 16  # flex_attention takes no narrower values


def attention(inputs: HeadInputs, bias_K: Tensor, options: dict[str, int] | None) -> Tensor:
    """Barycentres as attention of teacher rows to the prototypes, and the student's log-sum-exp as another.

    The student's values are zeros of the least width: its gradient comes from the log-sum-exp alone. The backward pass of
    flex_attention forms the gradients of queries, keys and values whether or not they are needed, and here only the values'
    of the first call and the queries' and keys' of the second are; this is fair, as its interface leaves no way to ask for
    fewer, so that whoever writes the loss with it pays for all.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    student_weight, teacher_weight = (w[None, None] for w in product_weights(inputs))

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
    """With torch's tiles, or with small ones where those do not fit the GPU's shared memory."""
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
            loss(inputs).backward()
        except RuntimeError as error:  # what torch refuses is the finding, and goes into the record
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            refusals.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
            continue
        finally:
            inputs.clear_gradients()
        return loss
    raise UnavailableError("flex_attention refuses these sizes. " + " | with small tiles: ".join(refusals))
