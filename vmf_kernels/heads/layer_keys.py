"""Names under which a last layer's prototypes are stored, and the conversion between these forms.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmf_kernels.prototypes import accumulation_dtype, weight_norm_prototypes

WEIGHT_NORM = ("weight_g", "weight_v")  # torch.nn.utils.weight_norm, and the published heads
PARAMETRIZED = ("parametrizations.weight.original0", "parametrizations.weight.original1")  # its successor in torch
PLAIN = ("weight",)
FORMS = (WEIGHT_NORM, PARAMETRIZED, PLAIN)


@torch.no_grad()
def convert_keys(state: dict[str, Any], prefix: str, own: tuple[str, ...], errors: list[str]) -> None:
    """Convert a last layer's entries from another form to the form ``own``; the prototypes stay equal.

    Weight-normed forms differ only in names. From a plain weight, ``v`` is the weight and ``g`` its norms; to a plain weight,
    it is ``g v / ||v||``. A row of zeros stays zero. If the entries include a part of ``own``, or do not form exactly one
    other form, they are not changed, so that a strict load names the keys.

    Args:
        state: changed in place.
        prefix: of the layer's keys.
        own: one of ``FORMS``.
        errors: receives a sentence if weight norm is not over dim 0, that is, not [K, 1] and [K, D].
    """
    whole = [form for form in FORMS if all(_is_weight(state.get(prefix + name)) for name in form)]
    if len(whole) != 1 or any(prefix + name in state for name in own):
        return
    names = [prefix + name for name in whole[0]]
    values = [state[name] for name in names]
    if own == PLAIN:
        magnitude, direction = values
        if direction.ndim != 2 or magnitude.shape != (direction.shape[0], 1):
            errors.append(
                f"{names[0]} has shape {tuple(magnitude.shape)} and {names[-1]} has shape {tuple(direction.shape)}; expected "
                f"[K, 1] and [K, D], weight norm over dim 0, to form {prefix}weight of them"
            )
            return
        values = [weight_norm_prototypes(magnitude, direction).effective_weight()]
    elif whole[0] == PLAIN:
        (weight,) = values
        if weight.ndim != 2:
            return
        norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=accumulation_dtype(weight.dtype))
        values = [norms.to(weight.dtype), weight]
    for name in names:
        del state[name]
    state.update((prefix + name, value) for name, value in zip(own, values, strict=True))


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
