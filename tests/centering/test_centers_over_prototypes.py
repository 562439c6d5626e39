"""Centres and Sinkhorn-Knopp with prototypes over gloo ranks, and with rows over ranks as well: equal to one process.

Four ranks share the prototypes out, or two do and two pairs have rows of their own. Every case runs with the same code on the
ranks and alone; all share one spawn.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from tests.backends.prototype_ranks import Place, results_in, start_rank
from tests.fuzz.statements.dino import exact_log_vmf_constant
from tests.fuzz.statements.sinkhorn import published_sinkhorn_knopp
from tests.measure import relative_error
from tests.on_ranks import start_ranks
from vmf_kernels import LogitCenter, ProbabilityCenter, PrototypeLogits
from vmf_kernels.centering.running_mean import RunningMean
from vmf_kernels.centering.sinkhorn import SinkhornKnopp
from vmf_kernels.prototypes import Prototypes

RANKS = 4
PROTOTYPES, DIM, TAU = 301, 24, 0.05
FOUR, TWO = (1, 120, 37, 143), (88, 213)  # prototypes of each rank
BUDGET = 1e-5  # relative, in norm; the centres are fp32
TARGET_BUDGETS = {"fp64": 1e-12, "fp32": 1e-6}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
CENTERS = ("logit", "log_probability", "probability")
OUTPUTS = ("unstored", "stored")
STARTS = ("zero", "first_batch")
# rows of the one group of four, and of each of the two pairs: of the first batch and the second
LAYOUTS = {"four": ((11,), (11,)), "mesh": ((7, 4), (2, 9)), "mesh, rows on one side": ((11, 0), (0, 11))}
BAD = (math.nan, math.inf, -math.inf)


class Spot(NamedTuple):
    """A process's prototypes and rows, and the groups it shares them with; all of them when it is alone."""

    place: Place = Place()
    row_group: ProcessGroup | None = None
    side: int | None = None  # which of the groups of rows

    def rows(self, split: Sequence[int]) -> slice:
        """This process's among rows dealt out to the sides in order."""
        return slice(None) if self.side is None else slice(sum(split[: self.side]), sum(split[: self.side + 1]))

    @property
    def groups(self) -> dict[str, Any]:
        return {"prototype_group": self.place.group, "row_group": self.row_group}


class Given(NamedTuple):
    """Arguments of ``update``."""

    teacher: PrototypeLogits | Tensor
    temperature: float
    bias: Tensor | None


def batches(dtype: torch.dtype = torch.float32) -> list[PrototypeLogits]:
    """Two batches of eleven rows, with norms at which probabilities underflow in fp32."""
    torch.manual_seed(1)
    weight = torch.randn(PROTOTYPES, DIM, dtype=torch.float64) * (15 / DIM**0.5)
    prototypes = Prototypes(weight.to(dtype), None, "linear_vmf")
    rows = [functional.normalize(torch.randn(11, DIM, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]
    return [PrototypeLogits(features, prototypes) for features in rows]


def given(spot: Spot, batch: PrototypeLogits, split: Sequence[int], output: str, tau: float = TAU) -> Given:
    """What this process has of the batch: its rows' logits to its prototypes."""
    mine = PrototypeLogits(batch.features[spot.rows(split)], spot.place.prototypes(batch.prototypes))
    if output == "unstored":
        return Given(mine, tau, None)
    normalizer = exact_log_vmf_constant(mine.prototypes.norms().double() / tau, DIM)
    return Given(mine.materialize(), tau, normalizer.to(mine.features.dtype))


def make_center(kind: str, start: str, spot: Spot) -> RunningMean:
    count = len(range(PROTOTYPES)[spot.place.block])
    if kind == "logit":
        return LogitCenter(count, start=start, **spot.groups)
    return ProbabilityCenter(count, average=kind, start=start, **spot.groups)


def center_cases(spot: Spot, layout: str) -> dict[str, Tensor]:
    """Centres after one batch as a step, and then both as micro-batches of another."""
    results = {}
    for kind, output, start in itertools.product(CENTERS, OUTPUTS, STARTS):
        center = make_center(kind, start, spot)
        parts = [given(spot, *each, output) for each in zip(batches(), LAYOUTS[layout], strict=True)]
        center.target_bias(*parts[0])
        center.update(*parts[0])
        for part in parts:
            center.accumulate(*part)
        center.apply_pending()
        results[f"{kind} {output} {start}"] = center.center[0]
    return results


def sinkhorn_cases(spot: Spot, layout: str) -> dict[str, Tensor]:
    """Dual vectors of both batches' rows, by iterations, dtype and backend; norms of 15 overflow where nothing is done."""
    results = {}
    settings = itertools.product((1, 3), DTYPES, OUTPUTS, ("streaming", "reference"))
    for (iterations, dtype, output, backend), split in itertools.product(settings, dict.fromkeys(LAYOUTS[layout])):
        sinkhorn = SinkhornKnopp(iterations, backend=backend, **spot.groups)
        dual = sinkhorn.target_bias(*given(spot, batches(DTYPES[dtype])[0], split, output, 1.0))
        results[f"{iterations} {dtype} {output} {backend} {split}"] = dual
    return results


@functools.cache  # what every test compares with
def alone(what: str, layout: str) -> dict[str, Tensor]:
    """The cases of one process that has everything."""
    return {"centers": center_cases, "sinkhorn": sinkhorn_cases}[what](Spot(), layout)


def bad_cases(spot: Spot) -> dict[str, Tensor]:
    """How far centres move, in all, by a batch whose logits to the first prototype, which one rank has, are bad."""
    results = {}
    for kind, value, start in itertools.product(CENTERS, BAD, STARTS):
        center = make_center(kind, start, spot)
        good, bad = (given(spot, batch, (11,), "stored") for batch in batches())
        assert isinstance(bad.teacher, Tensor)
        if spot.place.block.start in (None, 0):
            bad.teacher[:, 0] = value
        center.begin(*bad)
        center.update(*bad)  # the first batch of all
        center.begin(*good)
        center.update(*good)
        before = center.center.clone()
        center.update(*bad)
        results[f"{kind} {value} {start}"] = torch.stack([(center.center - before).abs().sum(), before.sum()])
    return results


def run_rank(rank: int, folder: str) -> None:
    start_rank(rank, folder, RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "prototypes"))
    side = rank // 2
    pair = Place.of(rank % 2, TWO, mesh.get_group("prototypes"))
    spots = {
        "four": Spot(Place.of(rank, FOUR, torch.distributed.group.WORLD)),
        "mesh": Spot(pair, mesh.get_group("rows"), side),
    }
    results: dict[str, Any] = {"bad": bad_cases(spots["four"])}
    for layout in LAYOUTS:
        spot = spots[layout.split(",")[0]]
        results[layout] = {"centers": center_cases(spot, layout), "sinkhorn": sinkhorn_cases(spot, layout)}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return results_in(Path(folder), RANKS)


def joined(ranks: Sequence[dict[str, Any]], layout: str, what: str, name: str) -> Tensor:
    """[K] from the ranks' blocks; those of the second pair of a mesh are bitwise the first's."""
    parts = [rank[layout][what][name] for rank in ranks]
    if layout != "four":
        assert all(torch.equal(a, b) for a, b in zip(parts[:2], parts[2:], strict=True)), "the pairs disagree"
        parts = parts[:2]
    return torch.cat(parts)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", CENTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_centers_equal_those_of_one_process(
    ranks: list[dict[str, Any]], layout: str, kind: str, output: str, start: str
) -> None:
    name = f"{kind} {output} {start}"
    error = relative_error(joined(ranks, layout, "centers", name), alone("centers", layout)[name])
    assert error <= BUDGET, f"relative error {error:.1e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("kind", CENTERS[1:])
def test_centers_of_own_prototypes_alone_are_others(kind: str) -> None:
    """Negative control: probabilities over a rank's own prototypes."""
    whole = alone("centers", "four")[f"{kind} unstored zero"]
    own = center_cases(Spot(Place.of(1, FOUR, None)), "four")[f"{kind} unstored zero"]
    error = relative_error(own, whole[Place.of(1, FOUR, None).block])
    assert error > 100 * BUDGET, f"relative difference {error:.1e}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinkhorn_targets_equal_those_of_one_process(
    ranks: list[dict[str, Any]], layout: str, dtype: str, output: str
) -> None:
    teacher = given(Spot(), batches(DTYPES[dtype])[0], (11,), "stored", 1.0)
    assert isinstance(teacher.teacher, Tensor)
    assert teacher.bias is not None
    logits = teacher.teacher + teacher.bias
    for name, of_one in alone("sinkhorn", layout).items():
        if f"{dtype} {output}" in name:
            got, expected = (
                (logits + dual).softmax(dim=1) for dual in (joined(ranks, layout, "sinkhorn", name), of_one)
            )
            error = (got - expected).abs().max().item()
            assert error <= TARGET_BUDGETS[dtype], f"{name}: {error:.1e}, budget {TARGET_BUDGETS[dtype]:.0e}"
            published = published_sinkhorn_knopp(logits, int(name[0]))
            error = (got - published).abs().max().item()
            assert error <= TARGET_BUDGETS[dtype], f"{name}: {error:.1e} from the published, same budget"


def test_a_dual_vector_of_own_prototypes_alone_is_another() -> None:
    """Negative control: rows normalised over a rank's own prototypes."""
    place, name = Place.of(1, FOUR, None), "3 fp64 unstored streaming (11,)"
    whole, own = alone("sinkhorn", "four")[name], sinkhorn_cases(Spot(place), "four")[name]
    error = relative_error(own, whole[place.block])
    assert error > 1e-3, f"relative difference {error:.1e}"


@pytest.fixture(scope="module")
def bad_alone() -> dict[str, Tensor]:
    return bad_cases(Spot())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", CENTERS)
def test_bad_logits_on_one_rank_leave_the_centers_of_all(
    ranks: list[dict[str, Any]], bad_alone: dict[str, Tensor], kind: str, value: float, start: str
) -> None:
    name = f"{kind} {value} {start}"
    for results in (*(rank["bad"] for rank in ranks), bad_alone):
        moved, before = results[name]
        assert before.isfinite()
        assert moved == 0, f"a centre moved by {moved:.1e} in all"
    total = sum(rank["bad"][name][1] for rank in ranks)
    torch.testing.assert_close(total, bad_alone[name][1], rtol=1e-5, atol=1e-5)
