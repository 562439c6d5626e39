"""``KoLeoLoss``, ``DistributedKoLeoLoss`` of one rank, the drop-ins', ``PrototypeKoLeoLoss`` and ``unique_prototypes``.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.fuzz.cases import Case
from tests.fuzz.inputs import DTYPES, Source, is_finite
from tests.fuzz.statements.spread import greedy_groups, koleo, prototype_koleo
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import DistributedKoLeoLoss, KoLeoLoss, PrototypeKoLeoLoss, unique_prototypes
from vmf_kernels.compat import dinov2, dinov3, lightly
from vmf_kernels.prototypes import accumulation_dtype

# a product of unit vectors cannot distinguish squares of distances nearer than this: documented as 5e-4 and 1e-8
BLUR = {torch.float32: 2.5e-7, torch.float64: 1e-15}
METRICS = {"cosine": 0.025, "euclidean": 0.3}
AT_THE_EDGE = 1e-5  # a distance so near to eps may be counted either way


def _rows(case: Case) -> Tensor:
    """[R, D] in the case's dtype; ``norms`` says how they lie."""
    source = Source.of(case)
    unit = normalize(source.normal(case.prototypes * case.steps, case.dim), dim=1)
    return source.stored(source.changed(unit, case.norms), case.dtype)


MAKES: dict[str, Callable[[Case], Callable[[Tensor], Tensor]]] = {
    "koleo": lambda case: KoLeoLoss(topk=case.topk, crops=case.steps),
    "distributed": lambda case: DistributedKoLeoLoss(topk=case.topk, crops=case.steps),
    "dinov2": lambda case: dinov2.KoLeoLoss(),
    "dinov3": lambda case: dinov3.KoLeoLossDistributed(case.topk),
    **{f"p={p}": lambda case, p=p: lightly.KoLeoLoss(p) for p in (1, 2, 3.5)},  # type: ignore[misc]
}


def koleo_faults(case: Case) -> list[str]:
    """KoLeo of features, of one crop or more."""
    rows, crops, topk, p = _rows(case), case.steps, case.topk, float(case.option.partition("p=")[2] or 2)
    loss = MAKES[case.option](case)
    if case.prototypes <= topk:
        try:
            loss(rows)
        except ValueError:
            return []
        return ["too few rows, but nothing is raised"]
    return _judged(case, rows, loss, lambda x: koleo(x, topk=topk, crops=crops, p=p), p)


def prototype_koleo_faults(case: Case) -> list[str]:
    """KoLeo of prototypes."""
    if case.prototypes < 2:
        return []
    rows = _rows(replace(case, steps=1))
    if not rows.double().norm(dim=1).all():
        return []  # a prototype at the origin has no direction, and the formula divides by its norm
    return _judged(case, rows, PrototypeKoLeoLoss(), prototype_koleo)


def _judged(
    case: Case, rows: Tensor, loss: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], p: float = 2.0
) -> list[str]:
    """The loss within the blur of its neighbours; where these are far from each other, the gradient near the formula's.

    Neighbours that are equally near differ in their distance in another ``p``-norm, whose gradient jumps at p = 1.
    """
    given, exact = rows.detach().requires_grad_(), rows.detach().double().requires_grad_()
    got = loss(given)
    (gradient,) = torch.autograd.grad(got, given)
    if not is_finite(rows):
        return [] if got.isnan() else [f"loss is {got.item()} of rows that are not finite"]
    truth = formula(exact)
    (expected,) = torch.autograd.grad(truth, exact)
    wide = accumulation_dtype(rows.dtype)
    gaps = _gaps(exact.detach(), case)
    blur = BLUR[wide] * 8
    shares = (blur / gaps[:, 0].square().clamp(min=blur)).mean().item()  # relative change of a distance, in the mean
    allowed = case.steps * (0.5 * shares + torch.finfo(wide).eps * 8 * (1 + abs(truth.item())))
    if gaps.min() ** 2 < blur:  # then only eps is left of a distance, and the logarithm of either is large
        allowed += case.steps * float((gaps[:, 0].square() < blur).double().mean()) * 20
    apart = gaps.shape[1] == 1 or bool((gaps[:, -1].square() - gaps[:, -2].square() > 4 * blur).all())
    found = []
    error = abs(got.item() - truth.item())
    if not error <= allowed and (apart or p == 2):
        found.append(f"loss: error {error:.2e}, budget {allowed:.2e}")
    if not gradient.isfinite().all():
        found.append("gradient is not finite")
    if apart and p > 1 and gaps.min() > 1e-2 and rows.double().norm(dim=1).min() > 1e-3:
        error = float((gradient.double() - expected).norm() / expected.norm().clamp(min=1e-30))
        kept = torch.finfo(rows.dtype)
        least = 1e2 * torch.finfo(wide).eps / float(gaps.min()) ** 2 + kept.eps
        least += kept.tiny * kept.eps * expected.numel() ** 0.5 / float(expected.norm().clamp(min=1e-30))
        # of two rows the gradients cancel up to the normalisation
        size = float((1 / (gaps[:, 0] * exact.detach().norm(dim=1))).mean() / expected.norm().clamp(min=1e-30))
        if not error <= least * max(1.0, size):
            found.append(f"gradient: error {error:.2e}, budget {least * max(1.0, size):.2e}")
    return found


def _gaps(rows: Tensor, case: Case) -> Tensor:
    """[R, topk + 1] distances to the nearest rows and the next one, of all crops; rows of zeros as they are."""
    found = []
    for crop in rows.chunk(case.steps):
        unit = normalize(crop, dim=1, eps=1e-8)
        distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        found.append(distances.topk(min(case.topk + 1, len(crop) - 1), dim=1, largest=False).values)
    return torch.cat(found)


def unique_faults(case: Case) -> list[str]:
    """The greedy count, unless a distance is at the edge."""
    rows = _rows(replace(case, steps=1))
    if rows.isnan().any():
        try:
            unique_prototypes(rows)
        except ValueError:
            return []
        return ["NaN raises nothing"]
    if not is_finite(rows):
        return []
    eps = METRICS[case.option]
    unit = normalize(rows.double(), dim=1)
    products = unit @ unit.T
    distances = 1 - products if case.option == "cosine" else (2 - 2 * products).clamp(min=0).sqrt()
    if bool(((distances - eps).abs() < AT_THE_EDGE).any()):
        return []
    found, expected = unique_prototypes(rows, eps, case.option), greedy_groups(rows, eps, case.option)
    sets = {
        frozenset(i for i, g in enumerate(groups) if g == group)
        for groups in [found.group.tolist()]
        for group in groups
    }
    right = {frozenset(i for i, g in enumerate(expected) if g == group) for group in expected}
    faults = [] if sets == right else [f"{len(sets)} groups, expected {len(right)}"]
    share = max(map(len, right)) / len(rows)
    return (
        faults
        if found.largest_share == share
        else [*faults, f"largest share is {found.largest_share}, expected {share}"]
    )


_FIELDS = ("prototypes", "dim", "norms", "layout")
_FEW = (2, 1, 3, 7, 16, 33, 129)
_DROP_IN = choices_of(*_FIELDS, "dtype") | {"prototypes": _FEW}
SUBJECTS = {
    "KoLeoLoss": Subject(
        koleo_faults,
        choices_of(*_FIELDS, "dtype", option=("koleo", "distributed"), topk=(1, 2, 3), steps=(1, 2, 3))
        | {"prototypes": _FEW},
    ),
    "compat.lightly.KoLeoLoss": Subject(koleo_faults, _DROP_IN | {"option": ("p=2", "p=1", "p=3.5")}),
    "compat.dinov2.KoLeoLoss": Subject(koleo_faults, _DROP_IN | {"option": ("dinov2",)}),
    "compat.dinov3.KoLeoLossDistributed": Subject(koleo_faults, _DROP_IN | {"option": ("dinov3",), "topk": (1, 2, 3)}),
    "PrototypeKoLeoLoss": Subject(
        prototype_koleo_faults, choices_of(*_FIELDS, "dtype") | {"prototypes": (*_FEW, 300, 1000)}
    ),
    "unique_prototypes": Subject(
        unique_faults, choices_of(*_FIELDS, "dtype", option=tuple(METRICS)) | {"prototypes": _FEW}
    ),
}
assert set(DTYPES) >= {"fp32", "fp64"}
