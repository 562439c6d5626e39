"""KoLeo on two gloo ranks against one process that has all rows, or all prototypes; all cases share one spawn.

Legend: B images, C crops, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.measure import relative_error
from tests.on_ranks import start_ranks
from vmf_kernels.compat import dinov3
from vmf_kernels.losses import prototype_koleo
from vmf_kernels.losses.koleo import DistributedKoLeoLoss, KoLeoLoss
from vmf_kernels.losses.prototype_koleo import PrototypeKoLeoLoss
from vmf_kernels.prototypes import weight_norm_prototypes
from vmf_kernels.ranks import gather_rows

RANKS, IMAGES, DIM = 2, 8, 6
BUDGET = 1e-12  # relative, in norm; everything is fp64
SPLITS = {"equal": (4, 4), "unequal": (6, 2), "lone": (7, 1), "first-only": (8, 0), "second-only": (0, 8)}
OPTIONS: dict[str, dict[str, int]] = {
    "plain": {},
    "topk": {"topk": 3},
    "crops": {"crops": 2},
    "both": {"topk": 2, "crops": 3},
}
PROTOTYPE_SPLITS = {"equal": (32, 32), "unequal": (57, 7), "lone": (1, 63)}
Results = dict[str, tuple[Tensor, Tensor]]  # loss and gradient


class DetachedKoLeoLoss(DistributedKoLeoLoss):
    """A wrong one: other ranks' rows are constants."""

    def _candidates(self, rows_BCD: Tensor, counts: list[int]) -> tuple[Tensor, int]:
        among, start = gather_rows(rows_BCD.detach(), self.group, counts)
        return torch.cat([among[:start], rows_BCD, among[start + rows_BCD.shape[0] :]]), start


def crops_of(count: int) -> Tensor:
    """[C, B, D] crops of the images, the same in every process."""
    random = torch.Generator().manual_seed(count)
    return torch.randn(count, IMAGES, DIM, dtype=torch.float64, generator=random)


def share_of(split: tuple[int, ...], rank: int | None) -> slice:
    """A rank's rows, or all of them for None."""
    return slice(0, sum(split)) if rank is None else slice(sum(split[:rank]), sum(split[: rank + 1]))


def koleo_cases(loss: type[KoLeoLoss], rank: int | None) -> Results:
    """Losses weighed by the rank's share of the images, and gradients of their sum at the rank's crops [C, B, D]."""
    results = {}
    for (name, options), (split_name, split) in itertools.product(OPTIONS.items(), SPLITS.items()):
        mine = crops_of(options.get("crops", 1))[:, share_of(split, rank)].clone().requires_grad_()
        value = loss(**options)(mine.flatten(0, 1)) * (mine.shape[1] / IMAGES)
        value.backward()
        assert mine.grad is not None
        results[f"{name} {split_name}"] = value.detach(), mine.grad
    return results


def local_cases(rank: int | None) -> Results:
    """Losses among the rank's own rows."""
    mine = crops_of(1)[0, share_of(SPLITS["equal"], rank)]
    return {"plain equal": (KoLeoLoss()(mine) * (mine.shape[0] / IMAGES), mine)}


def prototype_cases(rank: int | None) -> Results:
    """Losses of prototypes whose blocks are on the ranks, and the gradient at this rank's directions."""
    prototype_koleo.TILE, prototype_koleo.BLOCK = 10, 7
    group = None if rank is None else torch.distributed.group.WORLD
    results = {}
    for name, split in PROTOTYPE_SPLITS.items():
        random = torch.Generator().manual_seed(5)
        mine = share_of(split, rank)
        direction = torch.randn(64, DIM, dtype=torch.float64, generator=random)[mine].clone().requires_grad_()
        magnitude = torch.randn(64, 1, dtype=torch.float64, generator=random)[mine]
        value = PrototypeKoLeoLoss(group=group)(weight_norm_prototypes(magnitude, direction))
        (2 * value).backward()
        assert direction.grad is not None
        results[name] = value.detach(), direction.grad
    prototype_koleo.TILE, prototype_koleo.BLOCK = 2048, 4096
    return results


def refusals(rank: int) -> dict[str, str]:
    """What a rank is told where the rows of both, or of the second alone, do not fit, and where it is differentiated twice."""
    odd = torch.randn(4, DIM) if rank == 0 else torch.randn(3, DIM)
    tall = odd if rank == 0 else torch.randn(2, 2, DIM)
    attempts: dict[str, Callable[[], object]] = {
        "few": lambda: DistributedKoLeoLoss(topk=2)(torch.randn(1, DIM)),
        "crops": lambda: DistributedKoLeoLoss(crops=2)(odd),
        "dims": lambda: DistributedKoLeoLoss()(tall),
        "group size": lambda: dinov3.KoLeoLossDistributed(1, 5)(torch.randn((4, 1)[rank], DIM)),
        "group overlap": lambda: dinov3.KoLeoLossDistributed(1, 3)(torch.randn((4, 2)[rank], DIM)),
        "small group": lambda: dinov3.KoLeoLossDistributed(2, 2)(torch.randn((4, 0)[rank], DIM)),
        "twice": lambda: second_derivative(DistributedKoLeoLoss()),
    }
    said = {}
    for name, attempt in attempts.items():
        said[name] = "no error"
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
    return said


def second_derivative(loss: KoLeoLoss) -> Tensor:
    x = torch.randn(4, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    return second


def cases(rank: int | None) -> dict[str, Any]:
    return {
        "distributed": koleo_cases(DistributedKoLeoLoss, rank),
        "detached": koleo_cases(DetachedKoLeoLoss, rank),
        "local": local_cases(rank),
        "prototypes": prototype_cases(rank),
    }


def run_rank(rank: int, folder: str) -> None:
    """All cases on one rank; what they gave goes to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(cases(rank) | {"refusals": refusals(rank)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class Runs(NamedTuple):
    """What each case gave: on the ranks, and alone."""

    ranks: list[dict[str, Any]]
    alone: dict[str, Any]

    def loss(self, case: str, name: str) -> Tensor:
        """Sum of the ranks' losses."""
        return torch.stack([rank[case][name][0] for rank in self.ranks]).sum()

    def gradient(self, case: str, name: str) -> Tensor:
        """The ranks' gradients put together; rows are the last but one dim."""
        return torch.cat([rank[case][name][1] for rank in self.ranks], dim=-2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    ranks = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]
    return Runs(ranks, cases(None))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", OPTIONS)
def test_losses_weighed_by_rows_sum_to_that_of_all_rows(runs: Runs, options: str, split: str) -> None:
    name = f"{options} {split}"
    loss, gradient = runs.alone["distributed"][name]
    error = max(
        relative_error(runs.loss("distributed", name), loss),
        relative_error(runs.gradient("distributed", name), gradient),
    )
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("options", OPTIONS)
def test_one_process_with_all_rows_has_the_local_loss(runs: Runs, options: str) -> None:
    crops = crops_of(OPTIONS[options].get("crops", 1))
    expected = KoLeoLoss(**OPTIONS[options])(crops.flatten(0, 1))
    assert torch.equal(runs.alone["distributed"][f"{options} equal"][0], expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_rows_has_a_loss_of_zero(runs: Runs, rank: int) -> None:
    split = ("second-only", "first-only")[rank]
    loss, gradient = runs.ranks[rank]["distributed"][f"both {split}"]
    assert loss == 0
    assert gradient.shape == (3, 0, DIM)


def test_neighbours_on_the_own_rank_only_give_another_loss(runs: Runs) -> None:
    """Negative control."""
    expected = runs.alone["distributed"]["plain equal"][0]
    assert relative_error(runs.loss("local", "plain equal"), expected) > 1e-3


@pytest.mark.parametrize("split", ["equal", "unequal"])
def test_without_the_gradient_to_other_ranks_it_is_another(runs: Runs, split: str) -> None:
    """Negative control: the loss is the same, so only the gradient tells."""
    loss, gradient = runs.alone["distributed"][f"plain {split}"]
    assert relative_error(runs.loss("detached", f"plain {split}"), loss) <= BUDGET
    assert relative_error(runs.gradient("detached", f"plain {split}"), gradient) > 1e-2


@pytest.mark.parametrize("split", PROTOTYPE_SPLITS)
def test_prototypes_over_ranks_have_the_loss_of_all(runs: Runs, split: str) -> None:
    loss, gradient = runs.alone["prototypes"][split]
    for rank in runs.ranks:
        error = relative_error(rank["prototypes"][split][0], loss)
        assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"
    error = relative_error(runs.gradient("prototypes", split), gradient)
    assert error <= BUDGET, f"gradient's relative error {error:.2e}, budget {BUDGET:.0e}"


def test_every_rank_is_told_that_all_have_too_few_rows(runs: Runs) -> None:
    expected = "features have shape (1, 6) and the ranks [1, 1] rows; expected [B, D] with B >= 3 rows over all ranks"
    assert [rank["refusals"]["few"] for rank in runs.ranks] == [expected] * RANKS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crops", "the ranks [4, 3] rows; expected [2 * B, D] with B >= 2 rows over all ranks"),
        ("dims", "the ranks [4, -1] rows; expected [B, D]"),
        ("group overlap", "loss_group_size is 3 but the ranks have [4, 2] rows"),
        ("small group", "loss_group_size is 2 but the ranks have [4, 0] rows"),
    ],
)
def test_rows_of_one_rank_that_do_not_fit_are_refused_on_all(runs: Runs, name: str, said: str) -> None:
    for rank in runs.ranks:
        assert said in rank["refusals"][name]


def test_rows_that_fit_a_group_are_taken(runs: Runs) -> None:
    """Negative control."""
    assert [rank["refusals"]["group size"] for rank in runs.ranks] == ["no error"] * RANKS


def test_a_second_derivative_over_ranks_is_refused(runs: Runs) -> None:
    for rank in runs.ranks:
        assert rank["refusals"]["twice"].startswith("rows gathered over ranks cannot be differentiated twice")


def test_a_second_derivative_of_own_rows_is_not() -> None:
    """Negative control, also of the distributed loss in one process."""
    for loss in (KoLeoLoss(), DistributedKoLeoLoss()):
        assert second_derivative(loss).ne(0).any()
