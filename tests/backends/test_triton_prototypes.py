"""Packing prototypes in Triton and pulling gradients back, against fp64, under Triton's interpreter.

Norms run from 0 over 1e-3 to 1e4, so that kappa reaches 1e5 at the temperature of 0.1.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.backends.interpreted import Damage, correct_bf16, damaged
from vmf_kernels import log_vmf_constant
from vmf_kernels.backends.triton.prototypes import (
    Network,
    PackedPrototypes,
    pack_networks,
    pack_prototypes,
    pull_back,
    with_bias,
)
from vmf_kernels.backends.triton.tiles import INTERPRETER_PAD
from vmf_kernels.prototypes import KINDS, LOWEST_BIAS, Prototypes, prepare_keys, pull_back_to_stored

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here: tests/gpu"),
    # a zero norm is divided by where its quotient is not used; NaN where a test puts it
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

DIMS = (2, 3, 16, 24, 63, 64, 65, 200, 256, 384, 768, 1000)
COUNTS = (1, 127, 300)
FEW, MANY = 40, 127  # prototypes, fewer where a program of the interpreter holds only a handful
VMF_KINDS = [kind for kind in KINDS if kind.endswith("_vmf")]
TEMPERATURE = torch.tensor(0.1, dtype=torch.float64)
SMALLEST_NORM, LARGEST_NORM = 1e-3, 1e4
LOG2_E = math.log2(math.e)
ULP = 2.0**-23
SMALLEST = 1e-300  # keeps 0/0 out of a share
# Of a half's rounding, after a few in fp32; fp16 has no smaller step than 2^-24.
CAST_BUDGET = {torch.float32: (4 * ULP, 0.0), torch.float16: (2.0**-11 + 4 * ULP, 2.0**-25)}
# Of one row of a gradient, as a share of what it is the sum of: a few roundings and A's own error.
GRADIENT_BUDGET = 1e-6
# A few of the tests change the kernel only in a place that the embedding dim decides: with recurrence, without, in chunks.
SOME_DIMS = (24, 65, 384)
# The kind with everything at every dim; the others lack parts of it, which the dim changes in no other way.
KINDS_AND_DIMS = [
    *((KINDS[-1], dim) for dim in DIMS),
    *((kind, dim) for kind in KINDS[:-1] for dim in SOME_DIMS),
]


class Gradients(NamedTuple):
    """What flows into the stored tensors."""

    weight: Tensor
    magnitude: Tensor | None


def stored(kind: str, count: int, dim: int, dtype: torch.dtype = torch.float32) -> Prototypes:
    """Prototypes of every size: the first row is zero, the last magnitude too, and every other magnitude negative."""
    norms = torch.logspace(math.log10(SMALLEST_NORM), math.log10(LARGEST_NORM), count)
    direction = torch.nn.functional.normalize(torch.randn(count, dim), dim=1)
    weight = direction * norms[:, None]
    if count > 1:
        weight[0] = 0
    if not kind.startswith("weight_norm"):
        return Prototypes(weight.to(dtype), None, kind)
    magnitude = norms.roll(3)[:, None] * torch.tensor([1.0, -1.0]).repeat(count)[:count, None]
    if count > 1:
        magnitude[-1] = 0
    return Prototypes(weight.to(dtype), magnitude.to(dtype), kind)


def in_fp64(prototypes: Prototypes) -> Prototypes:
    magnitude = None if prototypes.magnitude is None else prototypes.magnitude.double()
    return replace(prototypes, weight=prototypes.weight.double(), magnitude=magnitude)


def packed_of(
    prototypes: Prototypes, extra_bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> PackedPrototypes:
    with correct_bf16() if prototypes.weight.dtype == torch.bfloat16 else nullcontext():
        return pack_prototypes(Network(prototypes, TEMPERATURE, extra_bias), dtype)


def nats(packed: PackedPrototypes) -> Tensor:
    """[K] fp64 bias without the padding."""
    return packed.bias[: packed.prototypes].double() / LOG2_E


def true_bias(prototypes: Prototypes, extra_bias: Tensor | None = None) -> Tensor:
    keys = prepare_keys(in_fp64(prototypes), TEMPERATURE, extra_bias, torch.float64)
    return torch.zeros(prototypes.count, dtype=torch.float64) if keys.bias is None else keys.bias


def assert_weight_within_budget(packed: PackedPrototypes, prototypes: Prototypes) -> None:
    """The effective prototypes, rounded once to the dtype of the products."""
    relative, smallest = CAST_BUDGET[packed.weight.dtype]
    truth = in_fp64(prototypes).effective_weight()
    error = (packed.weight[: prototypes.count, : prototypes.dim].double() - truth).abs()
    excess = (error / (relative * truth.abs() + smallest + SMALLEST)).max().item()
    assert excess <= 1, f"an element of w is off by {excess:.2f} of its budget {relative:.1e} |w| + {smallest:.1e}"


def normaliser_budget(kappa: Tensor, dim: int) -> float:
    """Relative error log C may have: what the recurrence costs below D = 64, or twice what PyTorch's fp32 is off."""
    truth = log_vmf_constant(kappa.double(), dim)
    own = ((log_vmf_constant(kappa.float(), dim).double() - truth) / truth)[kappa > 0].abs().max().item()
    return max(2e-6 if dim < 64 else 1e-6, 2 * own)


def assert_normaliser_within_budget(packed: PackedPrototypes, prototypes: Prototypes) -> None:
    truth = true_bias(prototypes)
    budget = normaliser_budget(in_fp64(prototypes).norms() / TEMPERATURE, prototypes.dim)
    error = torch.where(truth == 0, nats(packed).abs(), ((nats(packed) - truth) / truth).abs()).max().item()
    assert error <= budget, f"log C at D = {prototypes.dim}: relative error {error:.1e}, budget {budget:.1e}"


def assert_packed_within_budget(packed: PackedPrototypes, prototypes: Prototypes) -> None:
    assert_weight_within_budget(packed, prototypes)
    assert_normaliser_within_budget(packed, prototypes)


def incoming(prototypes: Prototypes) -> tuple[Tensor, Tensor]:
    """Loss gradients at the effective prototypes and at the bias, of one size with each other."""
    return torch.randn(prototypes.count, prototypes.dim), torch.randn(prototypes.count) * prototypes.dim**0.5


def pulled_back(prototypes: Prototypes, gradient: Tensor, bias_gradient: Tensor) -> Gradients:
    gradient = gradient.clone()
    with correct_bf16() if prototypes.weight.dtype == torch.bfloat16 else nullcontext():
        magnitude = pull_back(prototypes, TEMPERATURE, gradient, bias_gradient)
    return Gradients(gradient, magnitude)


def assert_gradients_within_budget(
    got: Gradients, prototypes: Prototypes, gradient: Tensor, bias_gradient: Tensor
) -> None:
    """Each row against fp64; its budget is a share of the two terms that are summed there, times their gain."""
    exact, truth = in_fp64(prototypes), gradient.double()
    magnitude = pull_back_to_stored(exact, TEMPERATURE, truth, bias_gradient.double())
    terms = gradient.double().norm(dim=1)
    if prototypes.has_normalizer:
        terms = terms + bias_gradient.double().abs() / TEMPERATURE
    gain = exact.gain()
    share = terms if gain is None else terms * gain.abs()
    worst = ((got.weight - truth).norm(dim=1) / (share + SMALLEST)).max().item()
    if magnitude is not None:
        assert got.magnitude is not None
        worst = max(worst, ((got.magnitude - magnitude).abs() / (terms + SMALLEST)).max().item())
    assert worst <= GRADIENT_BUDGET, f"a row is off by {worst:.1e} of its terms, budget {GRADIENT_BUDGET:.0e}"


@pytest.mark.parametrize(("kind", "dim"), KINDS_AND_DIMS)
def test_prototypes_are_packed_as_fp64_prepares_them(kind: str, dim: int, uninitialised_memory_is_nan: None) -> None:
    prototypes = stored(kind, MANY if dim <= 200 else FEW, dim)
    packed = packed_of(prototypes)
    assert_packed_within_budget(packed, prototypes)


@pytest.mark.parametrize(
    ("kind", "stored_dtype", "dtype", "count"),
    [
        *((kind, torch.bfloat16, torch.float16, 127) for kind in KINDS),
        *(("weight_norm_vmf", torch.bfloat16, torch.float32, count) for count in COUNTS),
        *(("linear_vmf", torch.float32, torch.float16, count) for count in COUNTS),
    ],
)
def test_every_dtype_and_count_is_packed_as_fp64_prepares_it(
    kind: str, stored_dtype: torch.dtype, dtype: torch.dtype, count: int, uninitialised_memory_is_nan: None
) -> None:
    prototypes = stored(kind, count, 65, stored_dtype)
    packed = packed_of(prototypes, dtype=dtype)
    assert packed.weight.dtype == dtype
    assert_packed_within_budget(packed, prototypes)


@pytest.mark.parametrize(("count", "dim"), [(1, 2), (127, 65), (300, 200), (1, 384)])
def test_padding_is_zero_and_weighs_nothing(count: int, dim: int, uninitialised_memory_is_nan: None) -> None:
    packed = packed_of(stored("linear", count, dim), torch.randn(count))
    assert packed.weight.shape == (-(-count // INTERPRETER_PAD) * INTERPRETER_PAD, packed.layout.width)
    assert not packed.weight[count:].any(), "rows of the padding are not zero"
    assert not packed.weight[:, dim:].any(), "columns of the padding are not zero"
    assert torch.equal(packed.bias[count:], torch.full_like(packed.bias[count:], 2 * LOWEST_BIAS * LOG2_E))


@pytest.mark.parametrize("kind", KINDS)
def test_whether_there_is_a_bias_is_said(kind: str) -> None:
    prototypes = stored(kind, 5, 16)
    without, with_one = packed_of(prototypes), packed_of(prototypes, torch.ones(5))
    assert (without.has_bias, with_one.has_bias) == (kind in VMF_KINDS, True)
    assert kind in VMF_KINDS or not without.bias[:5].any(), "a bias that nobody asked for"


@pytest.mark.parametrize("kind", KINDS)
def test_an_extra_bias_is_added_in_nats(kind: str) -> None:
    prototypes, extra = stored(kind, MANY, 24), 30 * torch.randn(MANY)
    terms = true_bias(prototypes).abs() + extra.double().abs()
    error = ((nats(packed_of(prototypes, extra)) - true_bias(prototypes, extra)).abs() / terms).max().item()
    budget = normaliser_budget(in_fp64(prototypes).norms() / TEMPERATURE, 24)
    assert error <= budget, f"a bias is off by {error:.1e} of its terms, budget {budget:.1e}"


@pytest.mark.parametrize("kind", ["linear", "linear_vmf"])
def test_an_extra_bias_of_minus_infinity_becomes_the_lowest(kind: str) -> None:
    extra = torch.zeros(5).index_fill(0, torch.tensor([3]), -torch.inf)
    packed = packed_of(stored(kind, 5, 24), extra)
    padding = packed.bias[5:]
    assert packed.bias[:5].min() == packed.bias[3] > padding.max(), f"-inf became {packed.bias[3]:.1e}"
    assert packed.bias.isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("where", ["extra bias", "weight", "magnitude"])
def test_nan_is_kept(where: str) -> None:
    prototypes, extra = stored("weight_norm_vmf", 5, 24), torch.zeros(5)
    assert prototypes.magnitude is not None
    {"extra bias": extra, "weight": prototypes.weight, "magnitude": prototypes.magnitude}[where][2] = torch.nan
    packed = packed_of(prototypes, extra)
    logits = packed.bias + packed.weight.sum(1)
    assert logits.isnan().nonzero().flatten().tolist() == [2], "NaN was lost, or it spread"


@pytest.mark.parametrize("restride", [lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, : x.shape[1]]])
@pytest.mark.parametrize("kind", ["linear_vmf", "weight_norm_vmf"])
def test_strides_of_the_weight_do_not_matter(kind: str, restride: Callable[[Tensor], Tensor]) -> None:
    prototypes = stored(kind, MANY, 24)
    flowing, strided = incoming(prototypes), replace(prototypes, weight=restride(prototypes.weight))
    expected, got = packed_of(prototypes), packed_of(strided)
    pairs = [(got.weight, expected.weight), (got.bias, expected.bias)]
    pairs.append((pulled_back(strided, *flowing).weight, pulled_back(prototypes, *flowing).weight))
    changed = [index for index, pair in enumerate(pairs) if not torch.equal(*pair)]
    assert not changed, f"{[('weight', 'bias', 'gradient')[index] for index in changed]} differ"


@pytest.mark.parametrize(("kind", "dim"), KINDS_AND_DIMS)
def test_gradients_flow_back_as_in_fp64(kind: str, dim: int, uninitialised_memory_is_nan: None) -> None:
    prototypes = stored(kind, MANY if dim <= 200 else FEW, dim)
    flowing = incoming(prototypes)
    assert_gradients_within_budget(pulled_back(prototypes, *flowing), prototypes, *flowing)


@pytest.mark.parametrize(
    ("kind", "stored_dtype", "count"),
    [
        *((kind, torch.bfloat16, 127) for kind in KINDS),
        *(("weight_norm_vmf", torch.float32, count) for count in COUNTS),
    ],
)
def test_gradients_flow_back_from_every_dtype_and_count(
    kind: str, stored_dtype: torch.dtype, count: int, uninitialised_memory_is_nan: None
) -> None:
    prototypes = stored(kind, count, 65, stored_dtype)
    flowing = incoming(prototypes)
    assert_gradients_within_budget(pulled_back(prototypes, *flowing), prototypes, *flowing)


@pytest.mark.parametrize("kind", ["normalized", "weight_norm", "weight_norm_vmf"])
def test_a_zero_direction_gets_no_gradient(kind: str) -> None:
    prototypes = stored(kind, MANY, 24)
    got = pulled_back(prototypes, *incoming(prototypes))
    assert not got.weight[0].any(), f"gradient {got.weight[0].norm():.1e} at a prototype without a direction"


@pytest.mark.quick
def test_plain_linear_prototypes_get_the_gradient_as_it_is() -> None:
    prototypes = stored("linear", MANY, 24)
    gradient, bias_gradient = incoming(prototypes)
    with damaged(lambda kernel, arguments, options: None) as launches:
        got = pulled_back(prototypes, gradient, bias_gradient)
    assert torch.equal(got.weight, gradient)
    assert launches == []


def at_a_warmer_temperature(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    arguments[3 if kernel == "pack_prototypes_kernel" else 4] = TEMPERATURE * 1.00001


def of_the_next_order(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    options["ORDER"] += 1


def with_unsigned_magnitudes(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    arguments[2 if kernel == "pull_back_kernel" else 1].abs_()


def without_a_coefficient(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    """The expansion without its first coefficient that is not 0, and whose loss fp32 can see: that of t^0, and of t."""
    for name, lost in (("COEFFICIENTS", 0), ("SLOPES", 1)):
        if name in options:
            options[name] = tuple(0.0 if i == lost else value for i, value in enumerate(options[name]))


PACKING_DAMAGES = [at_a_warmer_temperature, of_the_next_order, with_unsigned_magnitudes, without_a_coefficient]


@pytest.mark.parametrize("dim", SOME_DIMS)
@pytest.mark.parametrize("damage", PACKING_DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_packing_fails_the_budget(damage: Damage, dim: int) -> None:
    """Negative control."""
    prototypes = stored("weight_norm_vmf", MANY, dim)
    with damaged(damage):
        packed = packed_of(copy.deepcopy(prototypes))
    with pytest.raises(AssertionError, match="budget"):
        assert_packed_within_budget(packed, prototypes)


@pytest.mark.parametrize("dim", SOME_DIMS)
@pytest.mark.parametrize("damage", PACKING_DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_way_back_fails_the_budget(damage: Damage, dim: int) -> None:
    """Negative control."""
    if (damage, dim) == (without_a_coefficient, 24):
        pytest.skip("twenty steps of the recurrence shrink what the expansion is off to less than fp32 rounds")
    prototypes = stored("weight_norm_vmf", MANY, dim)
    flowing = incoming(prototypes)
    with damaged(damage):
        got = pulled_back(copy.deepcopy(prototypes), *flowing)
    with pytest.raises(AssertionError, match="budget"):
        assert_gradients_within_budget(got, prototypes, *flowing)


@pytest.mark.parametrize(
    "kinds", [("weight_norm_vmf", "weight_norm_vmf"), ("linear", "weight_norm"), ("normalized",) * 2]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_both_networks_in_one_launch_are_the_same_bits(
    kinds: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype], uninitialised_memory_is_nan: None
) -> None:
    student, teacher = (stored(kind, 130, 65, dtype) for kind, dtype in zip(kinds, dtypes, strict=True))
    student = replace(student, weight=student.weight.repeat(1, 2)[:, :65])  # another stride
    networks = Network(student, TEMPERATURE), Network(teacher, TEMPERATURE / 2, torch.randn(130))
    with damaged(lambda kernel, arguments, options: None) as launches:
        got = pack_networks(*networks, torch.float16)
    assert launches == ["pack_networks_kernel"]
    alone = [pack_prototypes(network, torch.float16) for network in networks]
    for name, one, other in zip(("student", "teacher"), got, alone, strict=True):
        assert torch.equal(one.weight, other.weight), f"the {name}'s prototypes differ"
        assert torch.equal(one.bias, other.bias), f"the {name}'s biases differ"
        assert one.has_bias == other.has_bias


@pytest.mark.parametrize("kind", KINDS)
def test_another_bias_from_kept_norms_is_the_same_bits(kind: str, uninitialised_memory_is_nan: None) -> None:
    prototypes, extra, warmer = stored(kind, MANY, 24), torch.randn(MANY), TEMPERATURE * 2
    kept = pack_prototypes(Network(prototypes, TEMPERATURE), torch.float32, keeps_norms=True)
    for bias in (None, extra):
        network = Network(prototypes, warmer, bias)
        got, expected = with_bias(kept, network), pack_prototypes(network, torch.float32)
        assert torch.equal(got.bias, expected.bias)
        assert torch.equal(got.weight, expected.weight)
        assert got.has_bias == expected.has_bias
