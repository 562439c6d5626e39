"""Prepared prototypes of a teacher are used by every sum of one call, and are never kept after it.

Run by Triton's interpreter. Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.backends.interpreted import damaged
from vmf_kernels import (
    DINOLoss,
    PrototypeLogits,
    SinkhornKnopp,
    linear_prototypes,
    prototype_cross_entropy,
    weight_norm_vmf_prototypes,
)
from vmf_kernels.backends.prepared import drop_prepared, keep_prepared, prepared_of
from vmf_kernels.centering.log_sums import LogSums
from vmf_kernels.prototypes import Prototypes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets nothing where there is a GPU")

K, DIM, IMAGES = 24, 16, 2
TAU = 0.07
PACKING = ("pack_networks_kernel", "pack_prototypes_kernel", "bias_kernel")


def features(rows: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, DIM), dim=1)


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(K, DIM) / 5, requires_grad=False)


def loss_of(centering: str, student: PrototypeLogits, teacher: PrototypeLogits) -> Tensor:
    loss = DINOLoss(K, 4, TAU, TAU, 0, 10, centering=centering, backend="triton")
    value: Tensor = loss(student, teacher, 0)
    return value


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Launches by kernel."""
    launches: Counter[str] = Counter()
    with damaged(lambda kernel, arguments, options: launches.update([kernel])):
        yield launches


@pytest.mark.parametrize(
    ("centering", "packed"),
    [
        ("logit", {"pack_networks_kernel": 1}),
        # five sums; then both networks for the loss
        ("sinkhorn_knopp", {"pack_networks_kernel": 1, "pack_prototypes_kernel": 1, "bias_kernel": 4}),
        # after the loss, two sums
        ("probability", {"pack_networks_kernel": 1, "pack_prototypes_kernel": 1, "bias_kernel": 1}),
    ],
)
def test_a_rule_packs_the_teacher_once_for_all_its_sums(centering: str, packed: dict[str, int]) -> None:
    outputs = [PrototypeLogits(features(n * IMAGES), linear_prototypes(weight())) for n in (4, 2)]
    with counted() as launches:
        loss = loss_of(centering, *outputs)
    assert {name: launches[name] for name in PACKING if launches[name]} == packed
    with mock.patch("vmf_kernels.centering.log_sums.keep_prepared"):
        assert torch.equal(loss, loss_of(centering, *outputs)), "another loss than with a preparation for each sum"
    assert prepared_of(outputs[1].prototypes) is None, "kept after the loss"


def average_into(teacher: Tensor) -> None:
    """As the published code moves a teacher: no version tells of it, and the address stays."""
    teacher.data.mul_(0.2).add_(torch.randn(K, DIM))


def test_a_teacher_that_moves_through_data_is_read_anew_by_the_next_call() -> None:
    """One ``Prototypes`` for the whole run: sums, the teacher moves, sums again or a loss."""
    moving = weight()
    teacher, rows, sinkhorn = linear_prototypes(moving), features(6), SinkhornKnopp(backend="triton")

    def bias(prototypes: Prototypes) -> Tensor:
        return sinkhorn.target_bias(PrototypeLogits(rows, prototypes), TAU)

    def loss(prototypes: Prototypes) -> Tensor:
        student = linear_prototypes(torch.ones(K, DIM))
        return prototype_cross_entropy(rows, student, rows, prototypes, torch.ones(1, 1), backend="triton").loss

    for after in (bias, loss):
        bias(teacher)
        average_into(moving)
        assert torch.equal(after(teacher), after(linear_prototypes(moving.clone()))), (
            f"{after.__name__} reads the old one"
        )


def test_sums_agree_with_torch_at_every_bias() -> None:
    prototypes = weight_norm_vmf_prototypes(torch.rand(K, 1) + 1, torch.randn(K, DIM))
    rows, logits = features(5), PrototypeLogits(features(5), prototypes).detach()
    logits = PrototypeLogits(rows, logits.prototypes)
    with LogSums(logits, TAU, backend="triton") as sums:
        for bias in (None, torch.randn(K), torch.randn(K)):
            got = sums.over_prototypes(bias)
            expected = LogSums(logits, TAU, backend="streaming").over_prototypes(bias)
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.quick
def test_what_is_kept_is_freed_also_by_an_error() -> None:
    logits = PrototypeLogits(features(5), linear_prototypes(weight())).detach()

    def fail() -> None:
        with LogSums(logits, TAU, backend="triton") as sums:
            sums.over_prototypes()
            assert prepared_of(logits.prototypes), "nothing was kept"
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert prepared_of(logits.prototypes) is None


@pytest.mark.quick
def test_dropping_twice_is_no_error_and_traced_weights_keep_nothing() -> None:
    for prototypes in (linear_prototypes(weight()), linear_prototypes(weight().to("meta"))):
        keep_prepared(prototypes)
        assert (prepared_of(prototypes) is None) == prototypes.weight.is_meta
        drop_prepared(prototypes)
        drop_prepared(prototypes)
        assert prepared_of(prototypes) is None
