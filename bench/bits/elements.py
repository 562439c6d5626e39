"""Cases of the parts of losses: prototypes, unstored logits and targets, centres, Sinkhorn-Knopp, KoLeo, normalisers.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.bits.inputs import KINDS, PLAIN, draw, draw_prototypes, draw_rows, gradients, leaves_of
from bench.bits.operators import BACKENDS, DTYPES
from bench.bits.record import Case
from vmf_kernels import (
    DistributedKoLeoLoss,
    KoLeoLoss,
    LogitCenter,
    ProbabilityCenter,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    SinkhornKnopp,
    TeacherTargets,
    log_vmf_constant,
    multi_crop_weights,
    unique_prototypes,
    vmf_mean_resultant_length,
)

TEMPERATURES = (0.04, 0.055, 0.07)  # of three steps
ROWS = (13, 5, 29)  # of three steps

REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "max": lambda logits: logits.max(dim=-1).values,
    "max of all": lambda logits: logits.max(),
    "min": lambda logits: logits.min(dim=-1).values,
    "amax": lambda logits: logits.amax(dim=-1, keepdim=True),
    "amin of all": lambda logits: logits.amin(),
    "topk": lambda logits: logits.topk(5).values,
    "topk, smallest": lambda logits: logits.topk(3, largest=False).values,
    "sum": lambda logits: logits.sum(dim=-1),
    "sum over rows": lambda logits: logits.sum(dim=0),
    "sum of all": lambda logits: logits.sum(),
    "mean": lambda logits: logits.mean(dim=-1),
    "mean over rows": lambda logits: logits.mean(dim=0),
    "materialize": lambda logits: logits.materialize(),
    "rows joined": lambda logits: _joined(logits[3:7], logits[:2], logits[-1:]).materialize(),
    "rows picked": lambda logits: logits[torch.tensor([4, 1, 4, 0])].materialize(),
    "rows split": lambda logits: logits.chunk(3)[1].unsqueeze(0).flatten(0, 1).materialize(),
    "other dtype": lambda logits: logits.double().materialize(),
}
INDICES: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda logits: logits.argmax(dim=-1),
    "argmin": lambda logits: logits.argmin(dim=-1),
    "argmax of all": lambda logits: logits.argmax(),
    "argmax over rows": lambda logits: logits.argmax(dim=0),
    "indices of max": lambda logits: logits.max(dim=-1).indices,
    "indices of topk": lambda logits: logits.topk(5).indices,
    "amax over rows": lambda logits: logits.detach().amax(dim=0),
}
CENTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "logit": ("LogitCenter", LogitCenter),
    "log_probability": ("ProbabilityCenter", partial(ProbabilityCenter, average="log_probability")),
    "probability": ("ProbabilityCenter", partial(ProbabilityCenter, average="probability")),
}


def cases() -> Iterator[Case]:
    """All of this file."""
    for (kind, maker), (name, dtype) in itertools.product(KINDS.items(), DTYPES.items()):
        yield Case(f"Prototypes/{kind}/{name}", ("Prototypes", maker), partial(_stored, kind, dtype))
        yield Case(f"PrototypeLogits/{kind}/{name}", ("PrototypeLogits", maker), partial(_reduced, kind, dtype, 257))
        run = partial(_targets, kind, dtype)
        yield Case(f"TeacherTargets/{kind}/{name}", ("TeacherTargets", "PrototypeLogits", maker), run)
    many = partial(_reduced, "weight_norm", torch.float32, 8197)
    yield Case("PrototypeLogits/more prototypes than a tile", ("PrototypeLogits",), many)
    yield from _center_cases()
    yield from _koleo_cases()
    for dim, (name, dtype) in itertools.product((2, 3, 24, 63, 64, 256, 1024), list(DTYPES.items())[:2]):
        run = partial(_normalizer, dim, dtype)
        yield Case(f"log_vmf_constant/D{dim}/{name}", ("log_vmf_constant", "vmf_mean_resultant_length"), run)
    yield Case("multi_crop_weights", ("multi_crop_weights",), _weights)
    for (kind, maker), metric in itertools.product(KINDS.items(), ("cosine", "euclidean")):
        run = partial(_unique, kind, metric)
        yield Case(f"unique_prototypes/{kind}/{metric}", ("unique_prototypes", "UniquePrototypes", maker), run)


def _center_cases() -> Iterator[Case]:
    for (rule, (maker, make)), start, form in itertools.product(
        CENTERS.items(), ("zero", "first_batch"), ("unstored", "stored")
    ):
        run = partial(_centered, partial(make, 257, start=start), form, "weight_norm_vmf", torch.float32)
        yield Case(f"{maker}/{rule}/{start}/{form}", (maker,), run)
    for (rule, (maker, make)), backend, name in itertools.product(CENTERS.items(), BACKENDS[:3], DTYPES):
        if (backend, name) != ("native", "fp64"):
            run = partial(_centered, partial(make, 257, backend=backend), "unstored", "linear", DTYPES[name])
            yield Case(f"{maker}/{rule}/{backend}/{name}", (maker,), run)
    for backend, form, kind in itertools.product(BACKENDS, ("unstored", "stored"), ("linear", "weight_norm_vmf")):
        run = partial(_balanced, SinkhornKnopp(3, backend=backend), form, kind)
        yield Case(f"SinkhornKnopp/{backend}/{form}/{kind}", ("SinkhornKnopp",), run)
    yield Case(
        "SinkhornKnopp/one round", ("SinkhornKnopp",), partial(_balanced, SinkhornKnopp(1), "unstored", "linear")
    )


def _koleo_cases() -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "topk": {"topk": 3},
        "crops": {"crops": 2},
        "crops and topk": {"crops": 2, "topk": 2, "eps": 1e-4},
    }
    for (name, option), (dtype_name, dtype) in itertools.product(options.items(), DTYPES.items()):
        for maker in (KoLeoLoss, DistributedKoLeoLoss):
            run = partial(_spread, maker, option, dtype)
            yield Case(f"{maker.__name__}/{name}/{dtype_name}", (maker.__name__,), run)
    for kind, (dtype_name, dtype) in itertools.product(("linear", "normalized", "weight_norm"), DTYPES.items()):
        run = partial(_spread_prototypes, kind, 257, dtype)
        yield Case(f"PrototypeKoLeoLoss/{kind}/{dtype_name}", ("PrototypeKoLeoLoss", KINDS[kind]), run)
    many = partial(_spread_prototypes, "weight_norm", 4099, torch.float32)
    yield Case("PrototypeKoLeoLoss/many", ("PrototypeKoLeoLoss",), many)


def _joined(*parts: Any) -> Any:
    """``torch.cat`` of rows that are not stored."""
    return torch.cat(list(parts))


def _stored(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    prototypes = draw_prototypes(kind, 67, 24, dtype)
    found: dict[str, Any] = {"norms": prototypes.norms(), "norms64": prototypes.norms(torch.float64)}
    found |= {"gain": prototypes.gain(), "counts": (prototypes.count, prototypes.dim, prototypes.has_normalizer)}
    found |= {"kinds": prototypes.without_vmf().kind, "stored": leaves_of(prototypes)}
    effective = prototypes.effective_weight()
    return found | {"effective": effective, **gradients(effective, leaves_of(prototypes))}


def _reduced(kind: str, dtype: torch.dtype, count: int) -> dict[str, Any]:
    prototypes, features = draw_prototypes(kind, count, 24, dtype), draw_rows(11, 24, dtype=dtype)
    logits, leaves = PrototypeLogits(features, prototypes), {"features": features, **leaves_of(prototypes)}
    found: dict[str, Any] = {}
    for name, reduce in REDUCTIONS.items():
        values = reduce(logits)
        found[name] = {"values": values, **gradients(values, leaves)}
    return found | {name: reduce(logits) for name, reduce in INDICES.items()}


def _targets(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    prototypes, features = draw_prototypes(kind, 67, 24, dtype), draw_rows(11, 24, dtype=dtype)
    bias, logits = draw(67), PrototypeLogits(features, prototypes)
    unstored, stored = TeacherTargets(logits, 0.05, bias), TeacherTargets(logits.materialize(), torch.tensor(0.05))
    joined = _joined(unstored[:3], unstored[torch.tensor([7, 5])])
    found = {"unstored": unstored.materialize(), "stored": stored.materialize(), "joined": joined.materialize()}
    return found | {"rows": stored.unflatten(0, (1, 11))[:, 4:].materialize()}


def _teachers(form: str, kind: str, dtype: torch.dtype) -> Iterator[tuple[Any, float]]:
    """Logits and temperature of three steps."""
    for rows, temperature in zip(ROWS, TEMPERATURES, strict=True):
        logits = PrototypeLogits(draw_rows(rows, 24, dtype=dtype), draw_prototypes(kind, 257, 24, dtype)).detach()
        yield (logits if form == "unstored" else logits.materialize()), temperature


def _centered(make: Callable[..., Any], form: str, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Steps of a centre: two by themselves, the third after two batches at once, one of which is not finite."""
    center, found = make(momentum=0.8), {}
    for step, (teacher, temperature) in enumerate(_teachers(form, kind, dtype)):
        found[f"bias {step}"] = center.target_bias(teacher, temperature)
        if step == 2:
            center.accumulate(teacher.materialize() * torch.nan if form == "unstored" else teacher * torch.inf, 0.1)
            center.accumulate(teacher, temperature)
        center.update(teacher, temperature)
        found[f"state {step}"] = dict(center.state_dict())
    return found


def _balanced(rule: SinkhornKnopp, form: str, kind: str) -> dict[str, Any]:
    found = {}
    for step, (teacher, temperature) in enumerate(_teachers(form, kind, torch.float32)):
        bias = draw(257) if form == "stored" else None
        found[f"bias {step}"] = rule(teacher, temperature, bias)
    return found


def _spread(make: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    features = draw(22, 24, dtype=dtype).requires_grad_()
    loss = make(**options)(features)
    return {"loss": loss, **gradients(loss, {"features": features})}


def _spread_prototypes(kind: str, count: int, dtype: torch.dtype) -> dict[str, Any]:
    prototypes = draw_prototypes(kind, count, 16, dtype)
    loss = PrototypeKoLeoLoss()(prototypes)
    tensor = prototypes.weight.detach().requires_grad_()
    of_tensor = PrototypeKoLeoLoss(1e-4)(tensor)
    found = {"loss": loss, **gradients(loss, leaves_of(prototypes)), "loss of a tensor": of_tensor}
    return found | gradients(of_tensor, {"tensor": tensor})


def _normalizer(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Value, slope and curvature."""
    kappa = torch.cat([torch.zeros(1, dtype=dtype), torch.logspace(-6, 6, 97, dtype=dtype)]).requires_grad_()
    constant, length = log_vmf_constant(kappa, dim), vmf_mean_resultant_length(kappa, dim)
    (slope,) = torch.autograd.grad(constant.sum(), kappa, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), kappa)
    (slope_of_length,) = torch.autograd.grad(length.sum(), kappa)
    return {
        "constant": constant,
        "length": length,
        "slope": slope,
        "curvature": curvature,
        "length's": slope_of_length,
    }


def _weights() -> dict[str, Tensor]:
    return {f"{views}": multi_crop_weights(*views) for views in ((1, 2), (2, 2), (2, 3), (2, 10), (3, 5), (5, 2))}


def _unique(kind: str, metric: str) -> dict[str, Any]:
    """Prototypes of which some are near others, in several blocks."""
    near = draw_prototypes(kind, 1301, 16)
    with torch.no_grad():
        near.weight[700:900] = near.weight[:200] + 0.01 * draw(200, 16)
        near.weight[1200:] = near.weight[5]
    found = {"of prototypes": unique_prototypes(near, metric=metric)}
    return found | ({"of a matrix": unique_prototypes(near.weight, 0.3, metric)} if kind in PLAIN else {})
