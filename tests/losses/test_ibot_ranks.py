"""iBOT's losses on two gloo ranks against one process that sees all images.

Every case runs three times with the same code, once a rank and once alone; ``Share`` says which images are whose. All cases
share one spawn of the ranks. Ranks have different numbers of masked patches, one of them none.

Legend: G global crops, B images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.losses.ibot_steps import GLOBAL, LOCAL, Batch, follow_by_name, heads, make_batch, our_step, schedule
from tests.measure import relative_error, worst_error
from tests.on_ranks import RANKS, Runs, run_cases
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss

IMAGES = 6  # of the whole batch: three a rank
BUDGET = 1e-5  # relative, in norm
LOSSES: dict[str, type[IBOTLoss]] = {"ibot": IBOTLoss, "vmf": IBOTvMFLoss}
TOKENS = ("all", "masked")
RULES = ("logit", "probability", "sinkhorn_knopp")
MASKS = ("unequal", "second-none")
KINDS = (("ibot", "unstored"), ("ibot", "stored"), ("vmf", "unstored"))  # iBOT-vMF takes unstored logits only
CALLS = ("all-tokens", "class-tokens")  # of local crops: as published, and as its README here has it
Results = dict[str, Tensor]


class Share(NamedTuple):
    """Which images one process has: those of its rank, or all of them when it is alone."""

    rank: int | None

    def of(self, rows: Tensor, crops: int) -> Tensor:
        """This process's images of [crops * B, ...] rows."""
        if self.rank is None:
            return rows.detach()
        mine: Tensor = rows.detach().unflatten(0, (crops, IMAGES))[:, self.rank :: RANKS].flatten(0, 1)
        return mine

    def batch(self, step: int, masks: str) -> Batch:
        """This process's part of a batch."""
        whole = make_batch(step, images=IMAGES)
        assert whole.local is not None
        hidden = [mask.clone() for mask in whole.masks]
        for mask in hidden:
            mask[0] = True  # so that there are many more on the first rank
            if masks == "second-none":
                mask[1::RANKS] = False
        return Batch(
            self.of(whole.crops, GLOBAL),
            self.of(whole.local, LOCAL),
            self.of(whole.views, GLOBAL),
            [self.of(mask, 1) for mask in hidden],
        )


def make_loss(method: str, tokens: str, centering: str) -> IBOTLoss:
    return LOSSES[method](*schedule(), center_tokens=tokens, centering=centering)


def loss_cases(share: Share) -> dict[str, Results]:
    """Losses and centres of two batches through heads that stay; every masking, rule and kind of output."""
    torch.manual_seed(2)
    networks = heads()
    results = {}
    for (method, output), tokens, rule, masks in itertools.product(KINDS, TOKENS, RULES, MASKS):
        loss = make_loss(method, tokens, rule)
        record: Results = {}
        for i in range(2):
            values = our_step(loss, output)(*networks, share.batch(i, masks), i)
            record |= {f"{i} {name} loss": value.detach() for name, value in values.items()}
        results[f"{method} {tokens} {rule} {masks} {output}"] = record | loss.state_dict()
    return results


class ClassTokensOfLocalCrops(nn.Module):
    """A head that is called on class tokens alone where the crops are local ones."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: Tensor) -> Any:
        return self.head(tokens) if tokens.shape[1] != 5 else (self.head(tokens[:, 0]),)


def training_cases(share: Share) -> dict[str, Results]:
    """Three steps under DDP (plain when alone): losses, gradients and centres by step."""
    results = {}
    for (method, loss_class), call, shared in itertools.product(LOSSES.items(), CALLS, (False, True)):
        torch.manual_seed(3)
        student, teacher = heads(prototypes=(90, 90), shared=shared)
        called: Any = student if call == "all-tokens" else ClassTokensOfLocalCrops(student)
        model = called if share.rank is None else nn.parallel.DistributedDataParallel(called)
        loss, optimizer = loss_class(*schedule((90, 90))), torch.optim.SGD(student.parameters(), lr=0.01)
        record: Results = {}
        for step in range(3):
            optimizer.zero_grad()
            value = our_step(loss)(model, teacher, share.batch(step, "second-none"), step)["loss"]
            value.backward()
            gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
            centers = {name: center.clone() for name, center in loss.state_dict().items()}
            record |= {f"{step} {k}": v for k, v in ({"loss": value.detach()} | centers | gradients).items()}
            optimizer.step()
            follow_by_name(teacher, student, 0.9)
        results[f"{method} {call} {shared}"] = record
    return results


def sharded_cases(share: Share) -> dict[str, Results]:
    """One step of a head whose parameters ``fully_shard`` frees after each of its calls."""
    results = {}
    for call, shared in itertools.product(CALLS, (False, True)):
        torch.manual_seed(5)
        student, teacher = heads(prototypes=(90, 90), shared=shared)
        model, loss = nn.Sequential(student), IBOTLoss(*schedule((90, 90)))
        called = model if call == "all-tokens" else ClassTokensOfLocalCrops(model)
        if share.rank is not None:
            shard_below_root(model)
            loss.register_forward_pre_hook(lambda *_, head=student: assert_sharded(head))
        value = our_step(loss)(called, teacher, share.batch(0, "second-none"), 0)["loss"]
        value.backward()
        gradients = {name: whole(p.grad) for name, p in student.named_parameters() if p.grad is not None}
        results[f"{call} {shared}"] = {"loss": value.detach()} | gradients
    return results


def shard_below_root(model: nn.Sequential) -> None:
    """Make the only child a unit of its own: FSDP2 keeps the parameters of its root from forward to backward pass."""
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[0], mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)


def assert_sharded(head: nn.Module) -> None:
    kept = [name for name, parameter in head.named_parameters() if not isinstance(parameter, DTensor)]
    assert not kept, f"not freed before the loss: {kept}"


def whole(gradient: Tensor) -> Tensor:
    """A gradient of which each rank may have a part."""
    full: Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return full.clone()


def rank_without_images_case(share: Share) -> Results:
    """The patch loss where rank 1 has no image at all: its collectives must still run."""
    torch.manual_seed(4)
    student, teacher = heads()
    batch = make_batch(0)
    rows = slice(0, 0) if share.rank == 1 else slice(None)
    mask = torch.cat(batch.masks)[rows]
    results: Results = {}
    for tokens, rule in itertools.product(TOKENS, RULES):
        loss = IBOTPatchLoss(schedule()[1], center_tokens=tokens, centering=rule)
        value = loss(student(batch.crops[rows])[1], teacher(batch.views[rows])[1], mask, 0.05)
        value.backward()
        results |= {f"{tokens} {rule} {name}": center for name, center in loss.state_dict().items()}
        results[f"{tokens} {rule} loss"] = value.detach()
    return results


CASES: tuple[Callable[[Share], Any], ...] = (loss_cases, training_cases, sharded_cases, rank_without_images_case)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("ranks"), CASES, Share)


def mean_of_losses(ranks: list[Results]) -> Results:
    """Rank 0's quantities with its losses replaced by the mean over ranks, as images are shared equally."""
    losses = {name: torch.stack([rank[name] for rank in ranks]).mean() for name in ranks[0] if name.endswith("loss")}
    return ranks[0] | losses


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("method", "output"), KINDS)
def test_losses_and_centers_equal_those_of_all_images(
    runs: Runs, method: str, output: str, tokens: str, rule: str, masks: str
) -> None:
    name = f"{method} {tokens} {rule} {masks} {output}"
    ranks = [rank["loss_cases"][name] for rank in runs.ranks]
    error, worst = worst_error(mean_of_losses(ranks), runs.alone["loss_cases"][name])
    assert error <= BUDGET, f"{worst}: relative error {error:.2e}, budget {BUDGET:.0e}"
    if masks == "second-none":
        assert ranks[1]["0 patch loss"] == 0, "the second rank has masked patches"
        assert ranks[0]["0 patch loss"] > 0
    for key in {"center", "center2"} & ranks[0].keys():
        assert torch.equal(ranks[0][key], ranks[1][key]), f"the ranks disagree on {key}"


def test_centers_follow_the_tokens_they_average(runs: Runs) -> None:
    """Negative control: the two sets of tokens have different means."""
    one, other = (runs.ranks[0]["loss_cases"][f"ibot {tokens} logit unequal unstored"]["center2"] for tokens in TOKENS)
    error = relative_error(one, other)
    assert error > 100 * BUDGET, f"relative difference {error:.2e}"


def test_masked_patches_are_weighted_by_their_number(runs: Runs) -> None:
    """Negative control: the mean of the ranks' own means over unequal numbers of patches is another centre."""
    torch.manual_seed(2)
    networks, centers = heads(), []
    for rank in range(RANKS):
        loss = make_loss("ibot", "masked", "logit")
        our_step(loss)(*networks, Share(rank).batch(0, "unequal"), 0)
        centers.append(loss.center2)
    whole = make_loss("ibot", "masked", "logit")
    our_step(whole)(*networks, Share(None).batch(0, "unequal"), 0)
    error = relative_error(torch.stack(centers).mean(dim=0), whole.center2)
    assert error > 100 * BUDGET, f"relative difference {error:.2e}"


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", LOSSES)
def test_training_on_two_ranks_equals_one_process(runs: Runs, method: str, call: str, shared: bool) -> None:
    ranks = [rank["training_cases"][f"{method} {call} {shared}"] for rank in runs.ranks]
    expected = runs.alone["training_cases"][f"{method} all-tokens {shared}"]
    error, name = worst_error(mean_of_losses(ranks), expected)
    assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"
    for name, tensor in ranks[0].items():
        assert name.endswith("loss") or torch.equal(tensor, ranks[1][name]), f"the ranks disagree on {name}"


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("call", CALLS)
def test_a_sharded_head_gives_the_gradients_of_a_whole_one(runs: Runs, call: str, shared: bool) -> None:
    """Its prototypes of the global and of the local crops are two copies, of two calls."""
    ranks = [rank["sharded_cases"][f"{call} {shared}"] for rank in runs.ranks]
    error, name = worst_error(mean_of_losses(ranks), runs.alone["sharded_cases"][f"all-tokens {shared}"])
    assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_rank_without_images_keeps_up(runs: Runs, tokens: str, rule: str) -> None:
    first, second = (rank["rank_without_images_case"] for rank in runs.ranks)
    alone, name = runs.alone["rank_without_images_case"], f"{tokens} {rule}"
    torch.testing.assert_close(first[f"{name} loss"], alone[f"{name} loss"])
    assert second[f"{name} loss"] == 0
    for key in {f"{name} center"} & alone.keys():
        for results in (first, second):
            error = relative_error(results[key], alone[key])
            assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"
