"""DistributedDataParallel and FSDP2 around a backbone and a head, on two gloo ranks, against one process with all images.

Every run trains the same way; ``Share`` says which images are whose, and ``WRAPPED`` how a network is wrapped. All runs of the
ranks share one spawn.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.fuzz.statements.dino import follow
from tests.measure import relative_error, worst_error
from tests.on_ranks import RANKS, Runs, run_cases
from tests.test_distributed import Share
from vmf_kernels import (
    DINOHead,
    DINOLoss,
    DINOvMFLoss,
    LogitCenter,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    TeacherTargets,
    unique_prototypes,
)
from vmf_kernels.heads.fuse import fuse_head

PROTOTYPES, DIM, IN_DIM, CROPS, IMAGES, STEPS = 301, 24, 12, 4, 8, 3
BUDGET = 1e-10  # relative, in norm, of fp64: three steps amplify the rounding of fp32 to more than 1e-5
SEEN = 1e-4  # what a mistake in the gradients or centres would be off by
BF16_BUDGET = 0.05  # of a gradient whose parameters and features are rounded to bf16
TAU = 0.05
LOSSES: dict[str, type[DINOLoss]] = {"dino": DINOLoss, "vmf": DINOvMFLoss}
Results = dict[str, Tensor]


class Model(nn.Module):
    """A backbone and a head: the library's, or one of another codebase that ``fuse_head`` has changed."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(IN_DIM, 16), nn.GELU(), nn.Linear(16, IN_DIM))
        self.head = make_dino_head() if head == "ours" else make_fused_head()

    def forward(self, x: Tensor) -> PrototypeLogits:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


def make_dino_head() -> nn.Module:
    return DINOHead(IN_DIM, PROTOTYPES, norm_last_layer=False, nlayers=2, hidden_dim=16, bottleneck_dim=DIM)


def make_fused_head() -> nn.Module:
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(x, dim=-1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        last = nn.utils.weight_norm(nn.Linear(DIM, PROTOTYPES, bias=False))
    return fuse_head(nn.Sequential(nn.Linear(IN_DIM, DIM), Unit(), last))


def networks(head: str) -> tuple[Model, Model]:
    torch.manual_seed(2)
    student = Model(head)
    with torch.no_grad():
        next(iter(student.head.parameters())).mul_(20)
        next(p for name, p in student.named_parameters() if name.endswith("_g")).uniform_(0.5, 1.5)
    return student, copy.deepcopy(student).requires_grad_(False)


def shard(module: nn.Module, **options: Any) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)), **options)


def shard_units(model: Model, **options: Any) -> Model:
    """Backbone, head, and what is left as units of FSDP2."""
    for module in (model.backbone, model.head, model):
        shard(module, **options)
    return model


def shard_last_layer_too(model: Model, **options: Any) -> Model:
    shard(list(model.head.children())[-1], **options)
    return shard_units(model, **options)


def shard_whole(model: Model) -> Model:
    shard(model)
    return model


def data_parallel(model: Model) -> nn.Module:
    # a teacher has nothing to reduce, and DistributedDataParallel refuses it
    trainable = any(p.requires_grad for p in model.parameters())
    return nn.parallel.DistributedDataParallel(model) if trainable else model


WRAPPED: dict[str, Callable[[Model], nn.Module]] = {
    "ddp": data_parallel,
    "fsdp-keep": lambda model: shard_units(model, reshard_after_forward=False),
    "fsdp-reshard": lambda model: shard_units(model, reshard_after_forward=True),
    "fsdp-last-reshard": lambda model: shard_last_layer_too(model, reshard_after_forward=True),
    "fsdp-last-keep": lambda model: shard_last_layer_too(model, reshard_after_forward=False),
    "fsdp-whole": shard_whole,
}
# a fused head's class is not the library's: as a unit that frees its parameters it needs its last layer to be one too, or a
# call of ``unshard`` between the head and the loss
RUNS = [
    *itertools.product(WRAPPED, ["ours"]),
    *itertools.product([wrap for wrap in WRAPPED if wrap != "fsdp-reshard"], ["fused"]),
    ("fsdp-unshard", "fused"),
]  # in the same order on every rank


# each under the loss that reads prototypes and norms; one of each way to hold parameters under the other, too
TRAINED = [
    *((wrap, head, "vmf") for wrap, head in RUNS),
    *(("ddp", "ours", "dino"), ("fsdp-reshard", "ours", "dino"), ("fsdp-last-keep", "fused", "dino")),
]

# every unit that returns logits returns tensors of its own, so FSDP2 does not warn of views
QUIET = ("fsdp-last-reshard", "fsdp-last-keep")


def units(module: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in module.modules() if isinstance(m, FSDPModule))


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor that may be sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(share: Share, wrap: str | None, head: str, method: str) -> Results:
    """Losses, gradients and centres by step, and the parameters of both networks at the end."""
    student, teacher = (network.double() for network in networks(head))
    wrapper = WRAPPED["fsdp-reshard" if wrap == "fsdp-unshard" else wrap] if wrap else lambda model: model
    run, run_teacher = wrapper(student), wrapper(teacher)
    loss = LOSSES[method](PROTOTYPES, CROPS, TAU, TAU, 0, 1).double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    results: Results = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        crops = torch.randn(CROPS, IMAGES, IN_DIM, generator=torch.Generator().manual_seed(step)).double()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if wrap in QUIET else "ignore")
            out, views = run(share.images(crops)), run_teacher(share.images(crops[:2] + 0.1))
        if wrap == "fsdp-unshard":
            student.head.unshard(), teacher.head.unshard()  # type: ignore[operator]
        value = loss(out, views, 0)
        value.backward()
        for unit in units(teacher):
            unit.reshard()  # no backward pass does so, and the next forward pass would find the old parameters
        results |= {f"step {step} gradient {n}": whole(p.grad) for n, p in student.named_parameters()}  # type: ignore[arg-type]
        results |= {f"step {step} loss": value.detach(), f"step {step} center": loss.center.clone()}
        optimizer.step()
        follow(teacher, student, 0.9)
    assert all(p.grad is None for p in teacher.parameters()), "the teacher got a gradient"
    for side, network in (("student", student), ("teacher", teacher)):
        results |= {f"{side} {name}": whole(p) for name, p in network.named_parameters()}
    return results


def training_cases(share: Share) -> dict[str, Results]:
    if share.rank is None:
        heads_and_losses = itertools.product(("ours", "fused"), LOSSES)
        return {f"{head} {method}": train(share, None, head, method) for head, method in heads_and_losses}
    return {f"{wrap} {head} {method}": train(share, wrap, head, method) for wrap, head, method in TRAINED}


def mixed_precision_cases(share: Share) -> dict[str, Results]:
    """Loss and gradients of one step with parameters cast to bf16 by FSDP2, reduced in fp32."""
    results = {}
    for reshard, output_dtype in itertools.product((True, False), (None, torch.float32)):
        student, teacher = networks("ours")
        if share.rank is not None:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype)
            for model in (student, teacher):
                shard_units(model, reshard_after_forward=reshard, mp_policy=policy)
        crops = torch.randn(CROPS, IMAGES, IN_DIM, generator=torch.Generator().manual_seed(0))
        out, views = student(share.images(crops)), teacher(share.images(crops[:2] + 0.1))
        dtype = (output_dtype or torch.bfloat16) if share.rank is not None else torch.float32
        assert out.dtype == out.prototypes.weight.dtype == dtype, f"head returned {out.dtype}"
        value = DINOvMFLoss(PROTOTYPES, CROPS, TAU, TAU, 0, 1)(out, views, 0)
        value.backward()
        gradients = {name: whole(p.grad) for name, p in student.named_parameters()}  # type: ignore[arg-type]
        results[f"{reshard} {output_dtype}"] = {"loss": value.detach(), **gradients}
    return results


def two_call_cases(share: Share) -> dict[str, Results]:
    """Gradients of two losses, each on a forward pass of its own, from one backward pass."""
    results = {}
    for wrap, head in RUNS:
        student, teacher = (network.double() for network in networks(head))
        if wrap == "fsdp-unshard" or (share.rank is None and wrap != "ddp"):
            continue
        name = head if share.rank is None else f"{wrap} {head}"
        run, run_teacher = (WRAPPED[wrap](m) if share.rank is not None else m for m in (student, teacher))
        crops = torch.randn(2, 2, IMAGES, IN_DIM, generator=torch.Generator().manual_seed(5)).double()
        total = torch.zeros((), dtype=torch.float64)
        for views in crops:
            loss = DINOvMFLoss(PROTOTYPES, 2, TAU, TAU, 0, 1).double()
            total = total + loss(run(share.images(views)), run_teacher(share.images(views + 0.1)), 0)
        total.backward()
        results[name] = {n: whole(p.grad) for n, p in student.named_parameters()}  # type: ignore[arg-type]
    return results


def freed_cases(share: Share) -> dict[str, str]:
    """What is said where the loss finds the prototypes freed; a read of them would end the process."""
    if share.rank is None:
        return {}
    student, teacher = networks("fused")
    for model in (student, teacher):
        shard_units(model, reshard_after_forward=True)
    x = torch.randn(CROPS * 2, IN_DIM)
    attempts: dict[str, Callable[[], object]] = {
        "dino": lambda: DINOLoss(PROTOTYPES, CROPS, TAU, TAU, 0, 1)(student(x), teacher(x[:4]), 0),
        "vmf": lambda: DINOvMFLoss(PROTOTYPES, CROPS, TAU, TAU, 0, 1)(student(x), teacher(x[:4]), 0),
        "center": lambda: LogitCenter(PROTOTYPES).update(teacher(x), TAU),
        "materialize": lambda: student(x).materialize(),
        "targets": lambda: TeacherTargets(teacher(x), TAU).materialize(),
        "koleo": lambda: PrototypeKoLeoLoss()(student(x).prototypes),
        "unique": lambda: unique_prototypes(student(x).prototypes.weight),
    }
    return messages_of(attempts)


def refused_cases(share: Share) -> dict[str, str]:
    """What else is said of units of FSDP2: a teacher that nobody reshards, and the logits of two calls."""
    if share.rank is None:
        return {}
    student, teacher = networks("ours")
    for model in (student, teacher):
        shard_units(model, reshard_after_forward=False)
    x = torch.randn(4, IN_DIM)
    teacher(x)
    attempts: dict[str, Callable[[], object]] = {
        "follow": lambda: follow(teacher, student, 0.9),
        "cat": lambda: torch.cat([student(x), student(x)]),
    }
    return messages_of(attempts)


def messages_of(attempts: dict[str, Callable[[], object]]) -> dict[str, str]:
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    return said


CASES: tuple[Callable[[Share], Any], ...] = (
    training_cases,
    mixed_precision_cases,
    two_call_cases,
    freed_cases,
    refused_cases,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("ranks"), CASES, Share, "ignore")


def mean_of_losses(ranks: list[Results]) -> Results:
    """Rank 0's quantities with its losses replaced by the mean over ranks, as images are shared equally."""
    return ranks[0] | {n: torch.stack([rank[n] for rank in ranks]).mean() for n in ranks[0] if n.endswith("loss")}


@pytest.mark.parametrize(("wrap", "head", "method"), TRAINED)
def test_two_ranks_equal_one_with_all_images(runs: Runs, wrap: str, head: str, method: str) -> None:
    ranks = [rank["training_cases"][f"{wrap} {head} {method}"] for rank in runs.ranks]
    error, name = worst_error(mean_of_losses(ranks), runs.alone["training_cases"][f"{head} {method}"])
    assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"
    for name, tensor in ranks[0].items():
        assert name.endswith("loss") or torch.equal(tensor, ranks[1][name]), f"the ranks disagree on {name}"


@pytest.mark.parametrize("head", ["ours", "fused"])
@pytest.mark.parametrize("method", LOSSES)
def test_one_rank_alone_differs(runs: Runs, method: str, head: str) -> None:
    """Negative control: half of the images train to other numbers, and three steps change the parameters."""
    expected = runs.alone["training_cases"][f"{head} {method}"]
    half = train(Share(0), None, head, method)
    error, _ = worst_error({n: half[n] for n in expected}, expected)
    assert error > SEEN, f"relative difference {error:.2e}"
    start = {f"student {name}": p.detach() for name, p in networks(head)[0].named_parameters()}
    moved = {name: relative_error(expected[name], p) for name, p in start.items()}
    assert min(moved.values()) > SEEN, f"the steps change parameters by {moved}"


@pytest.mark.parametrize(("wrap", "head"), RUNS)
def test_two_forward_passes_before_a_backward_pass(runs: Runs, wrap: str, head: str) -> None:
    if wrap == "fsdp-unshard":
        pytest.skip("as the others, but by hand")
    for rank in runs.ranks:
        error, name = worst_error(rank["two_call_cases"][f"{wrap} {head}"], runs.alone["two_call_cases"][head])
        assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("output_dtype", [None, torch.float32])
@pytest.mark.parametrize("reshard", [True, False])
def test_parameters_in_bf16_are_close_to_fp32(runs: Runs, reshard: bool, output_dtype: torch.dtype | None) -> None:
    name = f"{reshard} {output_dtype}"
    ranks = [rank["mixed_precision_cases"][name] for rank in runs.ranks]
    error, worst = worst_error(mean_of_losses(ranks), runs.alone["mixed_precision_cases"][name])
    assert error <= BF16_BUDGET, f"{worst}: relative error {error:.2e}, budget {BF16_BUDGET:.0e}"
    assert error > 1e-4, f"relative error {error:.2e}: nothing was rounded to bf16"


@pytest.mark.parametrize("use", ["dino", "vmf", "center", "materialize", "targets", "koleo", "unique"])
def test_freed_prototypes_are_refused_with_the_remedies(runs: Runs, use: str) -> None:
    for rank in runs.ranks:
        message = rank["freed_cases"].get(use, "nothing was raised")
        assert "reshard_after_forward=False" in message, message
        assert "unshard()" in message, message


def test_a_teacher_that_stays_unsharded_cannot_follow_unnoticed(runs: Runs) -> None:
    for rank in runs.ranks:
        assert "DTensor" in rank["refused_cases"].get("follow", "nothing was raised")


def test_logits_of_two_calls_of_a_unit_are_joined(runs: Runs) -> None:
    for rank in runs.ranks:
        assert rank["refused_cases"].get("cat", "nothing was raised") == "nothing was raised"
