"""The interface of ``vmf_kernels._cuda`` in plain torch, on the memory of CPU tensors, for machines without a GPU.

Like the compiled module, it gets addresses. It reads and writes only what the documentation (csrc/cuda/*.h) says,
and asserts the caller's duties. So everything around the kernels is tested: padding, offsets, splits, layouts, tails.

Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim, N splits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vmf_kernels.backends.cuda import binding, prototypes
from vmf_kernels.backends.cuda.layouts import PAD_TO, WIDTHS

LOG2_E = math.log2(math.e)
LOWEST = -1e38  # a first running maximum
LARGEST = 1e18  # of kappa/nu
ROW_TILE, SHARED_TILE, OWN_TILE = 16, 64, 32  # small, so that few rows and prototypes still make several
ALIGNMENT = 16  # bytes
FP32, FP64 = torch.float32, torch.float64

Damage = Callable[[str, dict[str, Any]], None]


class Element(Enum):
    bf16 = torch.bfloat16
    fp16 = torch.float16


class Stored(Enum):
    fp32 = torch.float32
    bf16 = torch.bfloat16
    fp16 = torch.float16


class Kind(Enum):
    linear = 0
    normalized = 1
    weight_norm = 2


@dataclass(frozen=True)
class Queue:
    device: int
    stream: int


@dataclass(frozen=True)
class Expansion:
    order: float
    steps: int
    coefficients: list[float]
    slopes: list[float]

    def __post_init__(self) -> None:
        assert (len(self.coefficients), len(self.slopes)) == (9, 10), "not an expansion of three terms"


@dataclass(frozen=True)
class StoredPrototypes:
    stored: Stored
    kind: Kind
    count: int
    dim: int
    stride: int
    weight: int
    magnitude: int
    temperature: int
    expansion: Expansion

    def rows(self) -> Tensor:
        span = (self.count - 1) * self.stride + self.dim
        flat = tensor_at(self.weight, (span,), self.stored.value, alignment=self.stored.value.itemsize)
        return flat.as_strided((self.count, self.dim), (self.stride, 1)).float()

    def magnitudes(self) -> Tensor:
        assert self.kind == Kind.weight_norm
        return tensor_at(self.magnitude, (self.count,), FP32, alignment=4)

    def inverse_temperature(self) -> Tensor:
        return 1 / tensor_at(self.temperature, (), FP64, alignment=8).float()


@dataclass(frozen=True)
class Packing:
    prototypes: StoredPrototypes
    element: Element
    width: int
    padded: int
    lowest_bias: float
    extra_bias: int
    packed: int
    bias: int
    norm: int


@dataclass(frozen=True)
class Side:
    rows: int
    keys: int
    features: int
    bias: int
    offset: int
    temperature: int


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, alignment: int = ALIGNMENT) -> Tensor:
    """A view of memory that somebody else owns."""
    assert address, "no address"
    assert address % alignment == 0, f"an address of {dtype} is not a multiple of {alignment}"
    size = math.prod(shape) * dtype.itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).view(shape)


def polynomial(t: Tensor, coefficients: list[float]) -> Tensor:
    value = torch.full_like(t, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * t + coefficient
    return value


def debye_ratio(kappa: Tensor, expansion: Expansion) -> Tensor:
    z = (kappa / expansion.order).clamp(max=LARGEST)
    s = (1 + z * z).sqrt()
    t = 1 / s
    return z / (1 + s) - (z * t) * t * (polynomial(t, expansion.slopes) / expansion.order)


def steps_of(expansion: Expansion) -> Iterator[float]:
    """Twice each order of the recurrence."""
    return (2 * (expansion.order - step) for step in range(expansion.steps))


def log_vmf_constant(kappa: Tensor, expansion: Expansion) -> Tensor:
    z = (kappa / expansion.order).clamp(max=LARGEST)
    s = (1 + z * z).sqrt()
    d = z * (z / (1 + s))
    result = expansion.order * (torch.log1p(d / 2) - d) + torch.log1p(d) / 2
    result = result + (d / s) * polynomial(1 / s, expansion.coefficients)
    ratio = debye_ratio(kappa, expansion)
    for twice in steps_of(expansion):
        result = result - torch.log1p(kappa * ratio / twice)
        ratio = kappa / (twice + kappa * ratio)
    return result


def mean_resultant_length(kappa: Tensor, expansion: Expansion) -> Tensor:
    ratio = debye_ratio(kappa, expansion)
    for twice in steps_of(expansion):
        ratio = kappa / (twice + kappa * ratio)
    return ratio


def reciprocal_or_zero(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / norm, 0.0)


class _Types:
    """The module's types, apart from ``StandIn``, whose signatures name those that they stand for."""

    Element, Stored, Kind, Queue = Element, Stored, Kind, Queue
    Expansion, StoredPrototypes, Packing, Side = Expansion, StoredPrototypes, Packing, Side


class StandIn(_Types):
    """The module's functions; ``damage(name, arguments by name)`` may change the arguments of each call."""

    archs = ("80", "90a", "100")
    source_digest, has_bounded_waits = "of a stand-in", False

    def __init__(self, damage: Damage) -> None:
        self.damage = damage
        self.called: list[str] = []

    def runtime_version(self) -> int:
        return 13000

    def driver_version(self) -> int:
        return 13000

    def row_tile(self) -> int:
        return ROW_TILE

    def prototype_tile(self, *, width: int, own_values: bool) -> int:
        assert width in WIDTHS, f"no kernel of width {width}"
        return OWN_TILE if own_values else SHARED_TILE

    def column_parts(self, *, width: int) -> int:
        assert width in WIDTHS, f"no kernel of width {width}"
        return 1 if width <= 256 else 2

    def pack_prototypes(self, networks: list[Packing], queue: Queue) -> None:
        networks = self._seen("pack_prototypes", {"networks": networks})["networks"]
        first = networks[0]
        for each in networks:
            stored = each.prototypes
            assert (stored.count, stored.dim) == (first.prototypes.count, first.prototypes.dim), "networks of two sizes"
            assert (each.element, each.width, each.padded) == (first.element, first.width, first.padded)
            pack_prototypes(each)

    def pull_back(self, stored: StoredPrototypes, queue: Queue, **arguments: Any) -> None:
        pull_back(**self._seen("pull_back", arguments | {"stored": stored}))

    def row_pass(self, queue: Queue, **arguments: Any) -> None:
        row_pass(**self._seen("row_pass", arguments))

    def column_pass(self, queue: Queue, student: Side, teacher: Side, **arguments: Any) -> None:
        column_pass(**self._seen("column_pass", arguments | {"student": student, "teacher": teacher}))

    def _seen(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.called.append(name)
        self.damage(name, arguments)
        return arguments


def pack_prototypes(packing: Packing) -> None:
    stored, padded, element = packing.prototypes, packing.padded, packing.element
    assert padded % PAD_TO == 0, f"{padded} prototypes are not padded to a multiple of {PAD_TO}"
    assert stored.count <= padded < stored.count + PAD_TO
    weight = stored.rows()
    norm = weight.norm(dim=1)
    if stored.kind == Kind.weight_norm:
        weight = weight * (stored.magnitudes() * reciprocal_or_zero(norm))[:, None]
        norm = stored.magnitudes().abs()
    elif stored.kind == Kind.normalized:
        weight = weight * reciprocal_or_zero(norm)[:, None]
    out = tensor_at(packing.packed, (padded, packing.width), element.value).zero_()
    out[: stored.count, : stored.dim] = weight.to(element.value)
    bias_K = torch.zeros(stored.count)
    if packing.extra_bias:
        bias_K = tensor_at(packing.extra_bias, (stored.count,), FP32, 4)
    if stored.temperature:
        bias_K = bias_K + log_vmf_constant(norm * stored.inverse_temperature(), stored.expansion)
    out_bias = tensor_at(packing.bias, (padded,), FP32).fill_(2 * packing.lowest_bias * LOG2_E)
    out_bias[: stored.count] = torch.where(bias_K < packing.lowest_bias, packing.lowest_bias, bias_K) * LOG2_E
    if packing.norm:
        tensor_at(packing.norm, (padded,), FP32).zero_()[: stored.count] = norm


def pull_back(*, stored: StoredPrototypes, bias_gradient: int, gradient: int, magnitude_gradient: int) -> None:
    weight, out = stored.rows(), tensor_at(gradient, (stored.count, stored.dim), FP32)
    norm = weight.norm(dim=1)
    inverse = reciprocal_or_zero(norm)
    magnitude = stored.magnitudes() if stored.kind == Kind.weight_norm else norm
    radial = torch.zeros_like(norm)
    if stored.temperature:
        scale = stored.inverse_temperature()
        length = mean_resultant_length(magnitude.abs() * scale, stored.expansion)
        radial = -tensor_at(bias_gradient, (stored.count,), FP32) * length * scale
    if stored.kind == Kind.linear:
        out += weight * (radial * inverse)[:, None]
        return
    along = (out * weight).sum(dim=1) * inverse
    gain = inverse
    if stored.kind == Kind.weight_norm:
        gain = magnitude * inverse
        tensor_at(magnitude_gradient, (stored.count,), FP32)[:] = along + radial * magnitude.sign()
    out.copy_((out - weight * (along * inverse)[:, None]) * gain[:, None])


def scale_at(temperature: int) -> Tensor:
    return (1 / tensor_at(temperature, (), FP64, alignment=8) * LOG2_E).float()


def row_pass(
    *,
    element: Element,
    width: int,
    rows: int,
    prototypes: int,
    splits: int,
    split_size: int,
    features: int,
    keys: int,
    values: int,
    bias: int,
    value_bias: int,
    temperature: int,
    statistics: int,
    barycentre: int,
    blocks_in_cluster: int = 1,
) -> None:
    assert blocks_in_cluster in (1, 2)
    tile = OWN_TILE if values not in (0, keys) else SHARED_TILE
    assert rows % ROW_TILE == 0, f"{rows} rows are not whole tiles"
    assert prototypes % PAD_TO == 0, f"{prototypes} prototypes are not padded"
    assert split_size % tile == 0, f"splits of {split_size} prototypes are not whole tiles of {tile}"
    assert (splits - 1) * split_size < prototypes <= splits * split_size, "the splits do not share out the prototypes"
    assert not value_bias or values not in (0, keys), "a value bias without values of their own"
    x_RD, w_KD = (tensor_at(p, (n, width), element.value).float() for p, n in ((features, rows), (keys, prototypes)))
    l_RK = x_RD @ w_KD.T * scale_at(temperature) + tensor_at(bias, (prototypes,), FP32)
    out = tensor_at(statistics, (4, splits, rows), FP32)
    for i in range(splits):
        part = slice(i * split_size, (i + 1) * split_size)
        top = l_RK[:, part].amax(dim=1).clamp(min=LOWEST)
        deviation = l_RK[:, part] - top[:, None]
        p = deviation.exp2()
        out[0, i], out[1, i], out[2, i], out[3, i] = top, p.sum(dim=1), (p * deviation).sum(dim=1), 0
        if value_bias:
            out[3, i] = p @ tensor_at(value_bias, (prototypes,), FP32)[part]
        if values:
            v = tensor_at(values, (prototypes, width), element.value)[part].float()
            tensor_at(barycentre, (splits, rows, width), FP32)[i] = p.to(element.value).float() @ v


def column_pass(
    *,
    student: Side,
    teacher: Side,
    element: Element,
    width: int,
    prototypes: int,
    prototype_count: int,
    dim: int,
    cotangents: int,
    unit: int,
    total: int,
    vectors: int,
    bias_gradient: int,
    usage: int,
    blocks_in_cluster: int = 1,
) -> None:
    assert blocks_in_cluster in (1, 2)
    assert prototypes % PAD_TO == 0
    unit_, total_ = tensor_at(unit, (), FP32, 4), tensor_at(total, (), FP32, 4)

    def weighted(side: Side) -> Tensor:
        """[K, R] ``unit n_r p_r(k)``."""
        assert side.rows % ROW_TILE == 0, f"{side.rows} rows are not whole tiles"
        w_KD = tensor_at(side.keys, (prototypes, width), element.value).float()
        x_RD = tensor_at(side.features, (side.rows, width), element.value).float()
        bias, offset = tensor_at(side.bias, (prototypes, 1), FP32), tensor_at(side.offset, (side.rows,), FP32)
        return (w_KD @ x_RD.T * scale_at(side.temperature) + (bias - offset)).exp2()

    q_KT = weighted(teacher)
    divisor = total_ if total_ != 0 else 1.0
    tensor_at(usage, (prototype_count,), FP32)[:] = (q_KT.sum(dim=1) / unit_ / divisor)[:prototype_count]
    if not vectors:
        return
    p_KS = weighted(student)
    z_SD = tensor_at(student.features, (student.rows, width), element.value).float()
    g_TD = tensor_at(cotangents, (teacher.rows, width), element.value).float()
    sums = p_KS.to(element.value).float() @ z_SD + q_KT.to(element.value).float() @ g_TD
    factor = (1 / (tensor_at(student.temperature, (), FP64, 8) * unit_)).float()
    tensor_at(vectors, (prototype_count, dim), FP32)[:] = (sums * factor)[:prototype_count, :dim]
    beta = (p_KS.sum(dim=1) - q_KT.sum(dim=1)) / unit_
    tensor_at(bias_gradient, (prototype_count,), FP32)[:] = beta[:prototype_count]


@contextmanager
def standing_in(damage: Damage = lambda name, arguments: None) -> Iterator[StandIn]:
    """The CUDA backend on CPU tensors, its module this one; Triton's kernels between are interpreted."""
    stand_in = StandIn(damage)
    prototypes._expansion.cache_clear()  # of another module's class
    with (
        mock.patch.object(binding, "module", return_value=stand_in),
        mock.patch.object(binding, "queue", return_value=Queue(0, 0)),
        mock.patch.object(binding, "unsupported_device", return_value=None),
    ):
        yield stand_in
    prototypes._expansion.cache_clear()
