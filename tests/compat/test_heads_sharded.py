"""Every drop-in head as a unit of FSDP2 inside a sharded network, on two gloo ranks, against one process with all images.

The network is the root of the units: FSDP2 keeps a root's parameters from the forward to the backward pass, so only a head
below it is resharded before the loss. All cases of the ranks share one spawn.

Legend: V views, B images, C width of the backbone, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.losses.ibot_steps import IN_DIM, our_step, schedule
from tests.losses.test_ibot_ranks import IMAGES, Share, mean_of_losses, whole
from tests.measure import relative_error, worst_error
from tests.on_ranks import RANKS, Runs, run_cases
from vmf_kernels import DINOLoss, DINOvMFLoss, IBOTLoss, PrototypeLogits
from vmf_kernels.compat import dino, dinov2, dinov3, ibot, lightly, solo

PROTOTYPES, PATCH_PROTOTYPES, DIM, HIDDEN, VIEWS = 61, 47, 8, 16, 2
BUDGET = 1e-10  # relative, in norm, of fp64
SEEN = 1e-4  # what a mistake would be off by
TAU = 0.05


def ibot_head(shared: bool) -> nn.Module:
    options: dict[str, Any] = {"nlayers": 2, "hidden_dim": HIDDEN, "bottleneck_dim": DIM, "norm_last_layer": False}
    return ibot.iBOTHead(IN_DIM, PROTOTYPES, patch_out_dim=PATCH_PROTOTYPES, shared_head=shared, **options)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "dino": lambda: dino.DINOHead(
        IN_DIM, PROTOTYPES, norm_last_layer=False, nlayers=2, hidden_dim=HIDDEN, bottleneck_dim=DIM
    ),
    "ibot": lambda: ibot_head(shared=False),
    "ibot-shared": lambda: ibot_head(shared=True),
    "dinov2": lambda: dinov2.DINOHead(IN_DIM, PROTOTYPES, nlayers=2, hidden_dim=HIDDEN, bottleneck_dim=DIM),
    "dinov2-vmf": lambda: dinov2.DINOvMFHead(IN_DIM, PROTOTYPES, nlayers=2, hidden_dim=HIDDEN, bottleneck_dim=DIM),
    "dinov3": lambda: dinov3.DINOHead(IN_DIM, PROTOTYPES, nlayers=2, hidden_dim=HIDDEN, bottleneck_dim=DIM),
    # of frozen norms, the default
    "lightly": lambda: lightly.DINOProjectionHead(IN_DIM, HIDDEN, DIM, PROTOTYPES),
    "lightly-v2": lambda: lightly.DINOv2ProjectionHead(IN_DIM, HIDDEN, DIM, PROTOTYPES),
    "solo": lambda: solo.DINOHead(
        IN_DIM, PROTOTYPES, use_bn=False, norm_last_layer=False, num_layers=2, hidden_dim=HIDDEN, bottleneck_dim=DIM
    ),
}


class Wrap(NamedTuple):
    """How a head is cut into units: ``reshard_after_forward`` of the head, and of its last layers if they are units."""

    head: bool
    last: bool | None = None

    def frees(self, parameter: str) -> bool:
        """Whether this parameter of the head is resharded before the loss."""
        of_last = parameter.startswith("last_layer") and self.last is not None
        return bool(self.last) if of_last else self.head


WRAPS = {
    "keep": Wrap(False),
    "reshard": Wrap(True),
    "last-reshard": Wrap(True, last=True),
    "only-last-reshard": Wrap(False, last=True),
}


class Outcome(NamedTuple):
    """One step: the loss, its centres and the gradients; which parameters of either head were sharded at the loss."""

    numbers: dict[str, Tensor]
    sharded: dict[str, list[str]]


def networks(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A backbone with this head, and a teacher near it."""
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(IN_DIM, IN_DIM), HEADS[name]()).double()
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if parameter_name.endswith("weight_g") and parameter.requires_grad:
                parameter.uniform_(0.5, 1.5)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter_name, parameter in teacher[1].named_parameters():
            if not parameter_name.endswith("weight_g"):
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return student, teacher


def shard(network: nn.Sequential, wrap: Wrap) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    if wrap.last is not None:
        for name, layer in network[1].named_children():
            if name.startswith("last_layer"):
                fully_shard(layer, mesh=mesh, reshard_after_forward=wrap.last)
    fully_shard(network[1], mesh=mesh, reshard_after_forward=wrap.head)
    fully_shard(network, mesh=mesh)


def loss_of(name: str, student: nn.Module, teacher: nn.Module, share: Share, loss: nn.Module) -> Tensor:
    """The loss of this process's images on logits that are not stored."""
    if name.startswith("ibot"):
        batch = share.batch(0, "unequal")
        assert batch.local is not None
        batch = batch._replace(crops=batch.crops.double(), local=batch.local.double(), views=batch.views.double())
        return our_step(loss)(student, teacher, batch, 0)["loss"]
    crops = torch.randn(VIEWS * IMAGES, IN_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, views = student(share.of(crops, VIEWS)), teacher(share.of(crops + 0.1, VIEWS))
    assert isinstance(out, PrototypeLogits), f"the head returned {type(out)}"
    return loss(out, views, 0)  # type: ignore[no-any-return]


def make_loss(name: str) -> nn.Module:
    if name.startswith("ibot"):
        counts = (PROTOTYPES, PROTOTYPES if name == "ibot-shared" else PATCH_PROTOTYPES)
        return IBOTLoss(*schedule(counts)).double()
    return (DINOvMFLoss if name == "dinov2-vmf" else DINOLoss)(PROTOTYPES, VIEWS, TAU, TAU, 0, 1).double()


def step(share: Share, name: str, wrap: Wrap | None) -> Outcome:
    """One forward and backward pass, sharded unless ``wrap`` is None."""
    student, teacher = networks(name)
    if wrap is not None:
        shard(student, wrap)
        shard(teacher, wrap)
    loss, sharded = make_loss(name), {}

    def look(*_: object) -> None:
        for side, head in (("student", student[1]), ("teacher", teacher[1])):
            sharded[side] = [n for n, parameter in head.named_parameters() if isinstance(parameter, DTensor)]

    loss.register_forward_pre_hook(look)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FSDP2-wrapped module .* returned a view")
        value = loss_of(name, student, teacher, share, loss)
    value.backward()
    numbers = {n: whole(p.grad) for n, p in student.named_parameters() if p.grad is not None}
    assert numbers.keys() == {n for n, p in student.named_parameters() if p.requires_grad}, "a gradient is missing"
    return Outcome({"loss": value.detach()} | loss.state_dict() | numbers, sharded)


def step_cases(share: Share) -> dict[str, tuple[Any, ...]]:
    if share.rank is None:
        return {name: tuple(step(share, name, None)) for name in HEADS}
    return {f"{name} {wrap}": tuple(step(share, name, WRAPS[wrap])) for name, wrap in itertools.product(HEADS, WRAPS)}


def head_without_copies_cases(share: Share) -> dict[str, str]:
    """What is said where a resharded head hands out logits of its parameters themselves."""
    if share.rank is None:
        return {}
    said = {}
    for name in HEADS:
        network, _ = networks(name)
        names_of_forward = type(network[1]).forward.__globals__  # of the module that defines the head
        shard(network, WRAPS["reshard"])
        rows = torch.randn(4, IN_DIM, dtype=torch.float64)
        network(rows).materialize()  # with the copies nothing is raised
        with mock.patch.dict(names_of_forward, outlive=lambda unit, logits: logits), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP2 warns of the views that these logits then hold
            logits = network(rows)
        try:
            logits.materialize()
        except RuntimeError as error:
            said[name] = str(error)
    return said


CASES: tuple[Callable[[Share], Any], ...] = (step_cases, head_without_copies_cases)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("ranks"), CASES, Share)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", HEADS)
def test_a_sharded_head_equals_a_whole_one(runs: Runs, name: str, wrap: str) -> None:
    ranks = [Outcome(*rank["step_cases"][f"{name} {wrap}"]).numbers for rank in runs.ranks]
    error, worst = worst_error(mean_of_losses(ranks), Outcome(*runs.alone["step_cases"][name]).numbers)
    assert error <= BUDGET, f"{worst}: relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", HEADS)
def test_parameters_are_resharded_before_the_loss(runs: Runs, name: str, wrap: str) -> None:
    """Without this the equality above would say nothing of freed parameters."""
    expected = [n for n, _ in HEADS[name]().named_parameters() if WRAPS[wrap].frees(n)]
    for rank in runs.ranks:
        for side, sharded in Outcome(*rank["step_cases"][f"{name} {wrap}"]).sharded.items():
            assert sharded == expected, f"{side}: sharded at the loss are {sharded}, expected {expected}"


@pytest.mark.parametrize("name", HEADS)
def test_without_its_copies_a_resharded_head_is_refused(runs: Runs, name: str) -> None:
    """Negative control: the parameters' memory is gone once the head has returned."""
    for rank in runs.ranks:
        message = rank["head_without_copies_cases"].get(name, "nothing was raised")
        assert "has been freed" in message, message


@pytest.mark.parametrize("name", HEADS)
def test_one_rank_alone_differs(runs: Runs, name: str) -> None:
    """Negative control: half of the images give another loss, and other gradients of every parameter."""
    expected, half = Outcome(*runs.alone["step_cases"][name]).numbers, step(Share(0), name, None).numbers
    errors = {quantity: relative_error(half[quantity], tensor) for quantity, tensor in expected.items()}
    assert min(errors.values()) > SEEN, f"relative differences {errors}"
