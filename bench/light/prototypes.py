"""Checks of packing prototypes and pulling gradients back, on weights of norm 2.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.light.exact import Exact, near
from bench.light.inputs import LOG2_E, Array, integers, padded, padded_vector, sparse_signs
from bench.light.stand import LOWEST, Stand
from vmf_kernels.backends.triton.prototypes import Network
from vmf_kernels.bessel import log_vmf_constant, vmf_mean_resultant_length
from vmf_kernels.prototypes import Prototypes

COUNT = 300
TERMS, NORM = 4, 2.0  # signs of a row, and so its norm
ZERO_ROW = 5  # has no direction
TAU = 0.5
ROUNDED = 2.0**-18  # relative: a few roundings, some by a GPU's approximate square root and division
NORMALISER = 2.0**-10  # of a bias with the von Mises-Fisher normaliser: enough to tell one prototype from another


class Stored(NamedTuple):
    """Prototypes and the float64 arrays that they are made of."""

    prototypes: Prototypes
    weight: Array  # [K, D]
    magnitude: Array  # [K]

    @property
    def gain(self) -> Array:
        """[K] effective by stored weight."""
        kind, norm = self.prototypes.kind.removesuffix("_vmf"), self.norm
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
        return {"linear": np.ones_like(norm), "normalized": inverse, "weight_norm": self.magnitude * inverse}[kind]

    @property
    def norm(self) -> Array:
        """[K] of the stored weights."""
        norm: Array = np.sqrt((self.weight**2).sum(axis=1))
        return norm

    @property
    def concentration(self) -> torch.Tensor:
        """[K] float64, of the von Mises-Fisher components."""
        of_weight = self.prototypes.kind.startswith("weight_norm")
        return torch.from_numpy(np.abs(self.magnitude) if of_weight else self.norm) / TAU


def stored(stand: Stand, kinds: tuple[str, ...], count: int) -> Iterator[tuple[str, Stored]]:
    """Each kind, stored in fp32 and in the dtype of the products, of the variant's dim and of an odd one."""
    for kind in kinds:
        for dtype, dim in ((torch.float32, stand.variant.dim), (stand.dtype, stand.variant.dim - 1)):
            weight = sparse_signs(count, dim, TERMS, 1)
            weight[ZERO_ROW] = 0
            magnitude = integers((count,), 1, 3, 3)
            magnitude[::7] = -1
            at = stand.floats(magnitude) if kind.startswith("weight_norm") else None
            device_weight = torch.from_numpy(weight).to(dtype).to(stand.device)
            case = f"{kind} {str(dtype).removeprefix('torch.')} D{dim}"
            yield case, Stored(Prototypes(device_weight, at, kind), weight, magnitude)


def check_pack(stand: Stand) -> None:
    """``pack_prototypes`` of every kind, its norms, and both networks by ``pack_networks``."""
    count = COUNT // 4 if stand.toy else COUNT
    temperature = torch.tensor(TAU, dtype=torch.float64, device=stand.device)
    for case, given in stored(stand, ("linear", "normalized", "weight_norm", "weight_norm_vmf"), count):
        stand.say("preparing", case)
        extra = integers((count,), -3, 3, 4)
        bias = stand.floats(extra)

        def launch(given: Stored = given, bias: Any = bias) -> Any:
            kernels, one = stand.kernels, Network(given.prototypes, temperature)
            other = one._replace(bias=bias)
            alone = kernels.pack_prototypes(other, stand.dtype, keeps_norms=True)
            student, teacher = kernels.pack_networks(one, other, stand.dtype)
            networks = {"alone": alone, "student": student, "teacher": teacher}
            biases = {f"bias {name}": packed.bias for name, packed in networks.items()}
            return (
                {f"weight {name}": packed.weight for name, packed in networks.items()} | biases | {"norm": alone.norm}
            )

        width = stand.layout(given.prototypes.dim).width
        stand.run(case, launch, expected_packing(given, extra, -(-count // stand.padding) * stand.padding, width))


def expected_packing(given: Stored, extra: Array, count: int, width: int) -> dict[str, Exact]:
    """[count, width] effective prototypes, [count] base-2 biases and norms; the student's bias is without the extra one."""
    weight = padded(given.gain[:, None] * given.weight, count, width)
    normaliser, relative = np.zeros_like(extra), ROUNDED
    if given.prototypes.has_normalizer:
        normaliser = log_vmf_constant(given.concentration, given.prototypes.dim).numpy()
        relative = NORMALISER
    exact = {"norm": near(padded_vector(given.concentration.numpy() * TAU, count, 0.0), ("prototype",), ROUNDED)}
    for name, added in (("alone", extra), ("student", 0.0), ("teacher", extra)):
        bias = padded_vector((normaliser + added) * LOG2_E, count, LOWEST)
        exact[f"weight {name}"] = Exact(weight, np.zeros_like(weight), ("prototype", "column"))
        exact[f"bias {name}"] = near(bias, ("prototype",), relative)
    return exact


def check_pull_back(stand: Stand) -> None:
    """``pull_back`` of every kind that has one."""
    count = COUNT // 4 if stand.toy else COUNT
    temperature = torch.tensor(TAU, dtype=torch.float64, device=stand.device)
    for case, given in stored(stand, ("normalized", "weight_norm", "weight_norm_vmf", "linear_vmf"), count):
        stand.say("preparing", case)
        gradient, beta = integers(given.weight.shape, -8, 8, 5), integers((count,), -3, 3, 6)
        at_keys, at_bias = stand.floats(gradient), stand.floats(beta)

        def launch(given: Stored = given, at_keys: Any = at_keys, at_bias: Any = at_bias) -> Any:
            at_weight = stand.poisoned("weight gradient", *at_keys.shape).copy_(at_keys)
            at_magnitude = stand.kernels.pull_back(given.prototypes, temperature, at_weight, at_bias)
            result = {"weight gradient": at_weight}
            return result if at_magnitude is None else result | {"magnitude gradient": at_magnitude}

        stand.run(case, launch, expected_pull_back(given, gradient, beta))


def expected_pull_back(given: Stored, gradient: Array, beta: Array) -> dict[str, Exact]:
    """Gradients at the stored weight [K, D] and at the magnitude [K]: equation (7) of vmf_kernels/README.md."""
    kind, norm = given.prototypes.kind, given.norm
    inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    radial = np.zeros_like(norm)
    if given.prototypes.has_normalizer:
        radial = -beta * vmf_mean_resultant_length(given.concentration, given.prototypes.dim).numpy() / TAU
    relative = NORMALISER if given.prototypes.has_normalizer else ROUNDED
    axes = ("prototype", "column")
    if kind == "linear_vmf":
        return {"weight gradient": near(gradient + given.weight * (radial * inverse)[:, None], axes, relative)}
    along = (gradient * given.weight).sum(axis=1) * inverse
    at_weight = (gradient - given.weight * (along * inverse)[:, None]) * given.gain[:, None]
    at_magnitude = along + radial * np.sign(given.magnitude)
    return {
        "weight gradient": near(at_weight, axes, relative),
        "magnitude gradient": near(at_magnitude, axes[:1], relative),
    }
