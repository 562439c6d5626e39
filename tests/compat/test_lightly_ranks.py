"""The drop-in for lightly on two gloo ranks with unequal numbers of masked patches, against lightly's own centre.

Legend: K prototypes, D bottleneck dim, M masked patches.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.compat.lightly_networks import GRID, IN_DIM, PROTOTYPES, Record, our_network, published
from tests.measure import relative_error, worst_error
from tests.on_ranks import start_ranks
from vmf_kernels.compat import lightly

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # what lightly's heads are made with

RANKS = 2
MASKED = {"unequal": (5, 2), "first-only": (6, 0), "second-only": (0, 6), "none": (0, 0)}  # patches of each rank


def rank_cases(rank: int) -> Record:
    """Losses, gradients and centres of two steps on a rank's masked patches."""
    results: Record = {}
    for split, counts in MASKED.items():
        for output in ("unstored", "stored"):
            torch.manual_seed(3)
            head, loss = our_network(torch.float64), lightly.IBOTPatchLoss(PROTOTYPES).double()
            for step in range(2):
                rows, mask = patches_of(counts, step)[rank]
                logits = head(rows)
                logits = logits if output == "unstored" else logits.materialize()
                head.zero_grad()
                value = loss(logits.detach(), logits, mask)
                value.backward()
                gradient = head.last_layer.weight_v.grad
                results[f"{split} {output} {step} loss"] = value.detach()
                results[f"{split} {output} {step} gradient"] = torch.zeros(1) if gradient is None else gradient.clone()
                results[f"{split} {output} {step} center"] = loss.state_dict()["center.center"].clone()
    return results


def patches_of(counts: tuple[int, ...], step: int) -> list[tuple[Tensor, Tensor]]:
    """Masked patches [M, D] and mask [2, H, W] of each rank."""
    random = torch.Generator().manual_seed(step)
    shares = []
    for count in counts:
        mask = torch.zeros(2 * math.prod(GRID), dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=random)[:count]] = True
        shares.append((torch.randn(count, IN_DIM, generator=random, dtype=torch.float64), mask.view(2, *GRID)))
    return shares


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(rank_cases(rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


def lightly_centers(counts: tuple[int, ...]) -> list[Tensor]:
    """The centre after each step by lightly's own module for each rank with rows, averaged over those ranks."""
    torch.manual_seed(3)
    head = our_network(torch.float64)
    centers = {r: published().IBOTPatchLoss(PROTOTYPES).double().center for r, count in enumerate(counts) if count}
    history = []
    for step in range(2):
        for rank, center in centers.items():
            center.update(head(patches_of(counts, step)[rank][0]).materialize().detach())
        values = [center.value for center in centers.values()]
        history.append(torch.stack(values).mean(dim=0) if values else torch.zeros(1, PROTOTYPES))
    return history


@pytest.mark.parametrize("output", ["unstored", "stored"])
@pytest.mark.parametrize("split", MASKED)
def test_center_is_the_mean_over_ranks_that_have_masked_patches(runs: list[Record], split: str, output: str) -> None:
    for step, expected in enumerate(lightly_centers(MASKED[split])):
        for rank in runs:
            error = relative_error(rank[f"{split} {output} {step} center"], expected)
            assert error <= 1e-10, f"step {step}: relative error {error:.2e}, budget 1e-10"


def test_center_of_all_rows_is_another_one() -> None:
    """Negative control: weighing ranks by their rows would be seen."""
    counts = MASKED["unequal"]
    torch.manual_seed(3)
    head, center = our_network(torch.float64), published().IBOTPatchLoss(PROTOTYPES).double().center
    center.update(head(torch.cat([rows for rows, _ in patches_of(counts, 0)])).materialize().detach())
    assert relative_error(center.value, lightly_centers(counts)[0]) > 1e-2


@pytest.mark.parametrize("split", MASKED)
def test_losses_of_ranks_are_finite_and_of_their_own_rows(runs: list[Record], split: str) -> None:
    for rank, record in enumerate(runs):
        assert all(tensor.isfinite().all() for tensor in record.values())
        for output in ("unstored", "stored"):
            value, gradient = (record[f"{split} {output} 0 {name}"] for name in ("loss", "gradient"))
            masked = MASKED[split][rank] > 0
            assert value.ne(0) == masked, f"rank {rank}: loss {value.item()}"
            assert gradient.ne(0).any() == masked, f"rank {rank}: gradient of norm {gradient.norm():.2e}"


@pytest.mark.parametrize("group", ["without-a-group", "with-a-group"])
def test_one_process_is_the_first_of_two_when_the_other_has_no_rows(
    runs: list[Record], group: str, tmp_path: Path
) -> None:
    if group == "with-a-group":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone = rank_cases(0)
    finally:
        if group == "with-a-group":
            torch.distributed.destroy_process_group()
    records = ({name: t for name, t in r.items() if name.startswith("first-only")} for r in (alone, runs[0]))
    error, quantity = worst_error(*records)
    assert error <= 1e-12, f"{quantity}: relative error {error:.2e}"
