"""What a backend prepares of a teacher's prototypes serves every pass of one step, and never outlives what it was made of.

Run by Triton's interpreter. Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.backends.interpreted import damaged
from vmf_kernels import DINOLoss, PrototypeLogits, linear_prototypes, weight_norm_prototypes
from vmf_kernels.log_sums import LogSums
from vmf_kernels.prepared import drop_prepared, keep_prepared, prepared_of
from vmf_kernels.prototypes import Prototypes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets nothing where there is a GPU")

K, DIM, IMAGES = 40, 16, 2
TAU = 0.07


def logits(weight: Tensor, rows: int) -> PrototypeLogits:
    features = torch.nn.functional.normalize(torch.randn(rows, DIM), dim=1)
    return PrototypeLogits(features, linear_prototypes(weight))


def weights() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    student, teacher = (torch.nn.Parameter(torch.randn(K, DIM) / 5) for _ in range(2))
    return student, teacher.requires_grad_(False)


def loss_of(centering: str, student: PrototypeLogits, teacher: PrototypeLogits) -> Tensor:
    loss = DINOLoss(K, 4, TAU, TAU, 0, 10, centering=centering, backend="triton")
    return loss(student, teacher, 0)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Launches by kernel."""
    launches: Counter[str] = Counter()
    with damaged(lambda kernel, arguments, options: launches.update([kernel])):
        yield launches


@pytest.mark.parametrize(
    ("centering", "packed"),
    [
        # both networks at once: nothing more is to come, nothing is kept
        ("logit", {"pack_networks_kernel": 1}),
        # five sums and the loss read the teacher's
        ("sinkhorn_knopp", {"pack_prototypes_kernel": 2, "bias_kernel": 5}),
        # after the loss, two sums
        ("probability", {"pack_networks_kernel": 1, "pack_prototypes_kernel": 1, "bias_kernel": 1}),
    ],
)
def test_a_step_packs_the_teacher_once_for_all_its_sums(centering: str, packed: dict[str, int]) -> None:
    student, teacher = weights()
    torch.manual_seed(1)
    outputs = logits(student, 4 * IMAGES), logits(teacher, 2 * IMAGES)
    with counted() as launches:
        loss = loss_of(centering, *outputs)
    names = ("pack_networks_kernel", "pack_prototypes_kernel", "bias_kernel")
    assert {name: launches[name] for name in names if launches[name]} == packed
    with mock.patch("vmf_kernels.log_sums.keep_prepared"):
        assert torch.equal(loss, loss_of(centering, *outputs)), "another loss than with a preparation for each pass"
    assert prepared_of(outputs[1].prototypes.as_read()) is None, "kept after the loss"


def in_place(weight: torch.nn.Parameter) -> None:
    weight.mul_(3)


def storage_exchanged(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data * 3


@pytest.mark.parametrize("change", [in_place, storage_exchanged], ids=lambda change: change.__name__)
def test_a_change_between_two_sums_is_seen(change: Callable[[torch.nn.Parameter], None]) -> None:
    _, teacher = weights()
    output = logits(teacher, 5)

    def sums() -> Tensor:
        return LogSums(output.detach(), TAU, backend="triton").over_prototypes()

    before = sums()
    with counted() as launches:
        assert torch.equal(sums(), before)
    assert not launches["pack_prototypes_kernel"], "a second sum prepares again"
    change(teacher)
    expected = torch.logsumexp(output.features @ teacher.T / TAU, dim=1)
    torch.testing.assert_close(sums(), expected, rtol=1e-5, atol=1e-5)


def test_a_change_through_data_is_seen_by_the_next_output_of_the_head() -> None:
    """No version tells of it (the exponential moving average of the published code): hence nothing outlives an output."""
    _, teacher = weights()
    first = logits(teacher, 5)
    LogSums(first.detach(), TAU, backend="triton").over_prototypes()
    teacher.data.mul_(3)
    second = PrototypeLogits(first.features, linear_prototypes(teacher))
    got = LogSums(second.detach(), TAU, backend="triton").over_prototypes()
    torch.testing.assert_close(got, torch.logsumexp(first.features @ teacher.T / TAU, dim=1), rtol=1e-5, atol=1e-5)


def test_what_is_kept_is_freed_with_the_output() -> None:
    _, teacher = weights()
    output = logits(teacher, 5)
    LogSums(output.detach(), TAU, backend="triton").over_prototypes()
    room = prepared_of(output.prototypes.as_read())
    assert room is not None
    assert room._made is not None
    packed = weakref.ref(room._made[2].weight)
    del output, room
    assert packed() is None, "it is still in memory"


def test_only_what_a_head_put_out_is_kept() -> None:
    """A parameter itself lives through steps, and changes unseen."""
    own = linear_prototypes(weights()[1])
    keep_prepared(own)
    assert prepared_of(own) is None
    keep_prepared(own.as_read())
    assert prepared_of(own.as_read()) is not None
    drop_prepared(own.as_read())
    assert prepared_of(own.as_read()) is None


def test_nothing_is_kept_of_tensors_without_a_version() -> None:
    with torch.inference_mode():
        prototypes = linear_prototypes(torch.randn(K, DIM)).as_read()
    keep_prepared(prototypes)
    room = prepared_of(prototypes)
    assert room is not None
    room.put(prototypes, "key", "thing")
    assert room.get(prototypes, "key") is None


@pytest.mark.parametrize("asked", ["another key", "another kind"])
def test_other_questions_find_nothing(asked: str) -> None:
    prototypes = weight_norm_prototypes(torch.rand(K, 1), torch.randn(K, DIM)).as_read()
    keep_prepared(prototypes)
    room = prepared_of(prototypes)
    assert room is not None
    room.put(prototypes, "key", "thing")
    assert room.get(prototypes, "key") == "thing"
    other = Prototypes(prototypes.weight, None, "linear") if asked == "another kind" else prototypes
    assert room.get(other, "key" if asked == "another kind" else "another") is None


def test_prototypes_are_read_as_one_object_until_their_memory_is_exchanged() -> None:
    weight = torch.nn.Parameter(torch.randn(K, DIM))
    prototypes = linear_prototypes(weight)
    read = prototypes.as_read()
    assert not read.requires_grad
    assert prototypes.as_read() is read
    assert read.as_read() is read
    assert prototypes.with_vmf().as_read() is not read
    assert prototypes.detach() is not read, "detached prototypes are the caller's own"
    weight.data = torch.randn(K, DIM)
    assert torch.equal(prototypes.as_read().weight, weight)


@pytest.mark.parametrize("asked", ["of a head's", "of those that were read"])
def test_prototypes_that_were_made_leaves_are_read_anew(asked: str) -> None:
    prototypes = linear_prototypes(torch.randn(K, DIM))
    leaves = prototypes.as_read()
    leaves.weight.requires_grad_()
    read = (prototypes if asked == "of a head's" else leaves).as_read()
    assert not read.requires_grad
    assert leaves.requires_grad
