"""Heads, ``fuse_head``, and what ``PrototypeLogits`` answer without their logits being stored.

Legend: R rows, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.cases import Case
from tests.fuzz.inputs import Source, is_finite
from tests.fuzz.statements import prototypes as statement_of
from tests.fuzz.statements.dino import PublishedDINOHead, PublishedWeightNorm
from tests.fuzz.statements.dinov2 import PublishedV2Head, PublishedV3Head
from tests.fuzz.statements.ibot import PublishedIBOTHead
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import DINOHead, DINOvMFHead, PrototypeLayer, PrototypeLogits, fuse_head
from vmf_kernels.compat import dinov2, dinov3, ibot
from vmf_kernels.prototypes import accumulation_dtype

HIDDEN, LEAST = 11, 1e-9  # relative, in norm, of outputs and gradients in fp64
IN_DIM = 7


def _sizes(case: Case) -> dict[str, Any]:
    return {"nlayers": case.topk, "hidden_dim": HIDDEN, "bottleneck_dim": case.dim}


HEADS: dict[str, tuple[Callable[[Case], nn.Module], Callable[[Case], nn.Module]]] = {
    "DINOHead": (
        lambda c: DINOHead(IN_DIM, c.prototypes, norm_last_layer=False, **_sizes(c)),
        lambda c: PublishedDINOHead(IN_DIM, c.prototypes, norm_last_layer=False, **_sizes(c)),
    ),
    "DINOvMFHead": (
        lambda c: DINOvMFHead(IN_DIM, c.prototypes, **_sizes(c)),
        lambda c: PublishedDINOHead(IN_DIM, c.prototypes, norm_last_layer=False, **_sizes(c)),
    ),
    "PrototypeLayer": (
        lambda c: PrototypeLayer(IN_DIM, c.prototypes),
        lambda c: PublishedWeightNorm(IN_DIM, c.prototypes, frozen_norm=False),
    ),
    "compat.dinov2.DINOHead": (
        lambda c: dinov2.DINOHead(IN_DIM, c.prototypes, **_sizes(c)),
        lambda c: PublishedV2Head(IN_DIM, c.prototypes, **_sizes(c)),
    ),
    "compat.dinov3.DINOHead": (
        lambda c: dinov3.DINOHead(IN_DIM, c.prototypes, **_sizes(c)),
        lambda c: PublishedV3Head(IN_DIM, c.prototypes, **_sizes(c)),
    ),
    "fuse_head": (
        lambda c: fuse_head(PublishedV3Head(IN_DIM, c.prototypes, **_sizes(c))),
        lambda c: PublishedV3Head(IN_DIM, c.prototypes, **_sizes(c)),
    ),
    "compat.ibot.iBOTHead": (
        lambda c: ibot.iBOTHead(IN_DIM, c.prototypes, patch_out_dim=c.prototypes, norm_last_layer=False, **_sizes(c)),
        lambda c: PublishedIBOTHead(
            IN_DIM, c.prototypes, patch_out_dim=c.prototypes, norm_last_layer=False, **_sizes(c)
        ),
    ),
}


def head_faults(case: Case) -> list[str]:
    """Logits, and gradients of a weighted sum of them at the input and at every parameter, from the published head's state."""
    torch.manual_seed(case.seed)
    ours, theirs = (make(case).double() for make in HEADS[case.option])
    if hasattr(ours, "reset_parameters"):
        ours.reset_parameters()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(case.images, IN_DIM, dtype=torch.float64)
    weights = torch.randn(case.images, case.prototypes, dtype=torch.float64)
    got, expected = (_outcome(head, x, weights) for head in (ours, theirs))
    copied = _outcome(copy.deepcopy(ours), x, weights)
    found = [f"{name}: the copy's is another" for name in got if not torch.equal(got[name], copied[name])]
    for name, exact in expected.items():
        error, allowed = float((got[name] - exact).norm()), LEAST * (1 + float(exact.norm()))
        if not error <= allowed:
            found.append(f"{name}: error {error:.2e}, budget {allowed:.2e}")
    return found


def _outcome(head: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    logits = head(x)
    values = logits.materialize() if isinstance(logits, PrototypeLogits) else logits
    names, parameters = zip(*head.named_parameters(), strict=True)
    gradients = torch.autograd.grad((values * weights).sum(), (x, *parameters), allow_unused=True)
    filled = {n: g for n, g in zip(("input", *names), gradients, strict=True) if g is not None}
    return {"logits": values.detach()} | filled


REDUCTIONS: dict[str, Callable[[Any], Tensor]] = {
    "max over prototypes": lambda x: x.max(dim=1).values,
    "min over prototypes": lambda x: x.amin(-1),
    "max over rows": lambda x: x.detach().amax(0),
    "max of all": lambda x: x.max(),
    "mean over rows": lambda x: x.mean(dim=0),
    "mean of all": lambda x: x.mean(),
    "sum over prototypes": lambda x: x.sum(dim=-1),
    "top two": lambda x: x.topk(min(2, x.shape[1]), dim=1).values,
    "at argmax": lambda x: (
        x.materialize().gather(1, x.argmax(dim=1, keepdim=True)) if not isinstance(x, Tensor) else x.amax(1, True)
    ),
}


def reduction_faults(case: Case) -> list[str]:
    """Every reduction of unstored logits against that of the formula's stored ones."""
    source = Source.of(case)
    stored = source.prototypes(case.dim)
    rows = source.rows(max(case.images, 1), stored.weight)
    too_short = case.norms in ("tiny", "denormal") and not stored.kind.startswith("linear")  # as zeros, as documented
    if too_short or not is_finite(rows, stored.weight, stored.magnitude):
        return []
    wide = accumulation_dtype(rows.dtype)
    magnitude = None if stored.magnitude is None else stored.magnitude.double()
    weight, norm = statement_of.effective(stored.weight.double(), magnitude, stored.kind)
    exact = rows.double() @ weight.T
    if exact.numel() and exact.abs().sum() > torch.finfo(rows.dtype).max:
        return []  # logits have the dtype of the rows, and fp16 ends at 65504
    got = PrototypeLogits(rows, stored)
    longest = float(rows.double().norm(dim=1).max() * norm.max())
    eps = max(torch.finfo(t).eps for t in (wide, rows.dtype, stored.weight.dtype))
    found = []
    for name, reduce in REDUCTIONS.items():
        value, truth = reduce(got), reduce(exact)
        if value.shape != truth.shape:
            found.append(f"{name}: shape {list(value.shape)}, expected {list(truth.shape)}")
            continue
        error = float((value.detach().double() - truth).abs().max())
        allowed = 4 * eps * longest * (case.prototypes if "sum" in name else 1) + torch.finfo(rows.dtype).tiny
        if not error <= allowed:
            found.append(f"{name}: error {error:.2e}, budget {allowed:.2e}")
    return found


_FIELDS = ("images", "prototypes", "dim", "kind", "dtype", "stored", "rows", "norms", "layout")
SUBJECTS = {
    "heads": Subject(
        head_faults,
        choices_of(
            images=(1, 2, 5), prototypes=(2, 1, 7, 33, 300), dim=(2, 3, 16, 31), topk=(1, 2, 3), option=tuple(HEADS)
        ),
    ),
    "PrototypeLogits": Subject(reduction_faults, choices_of(*_FIELDS)),
}
