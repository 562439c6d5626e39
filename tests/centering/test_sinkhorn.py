"""Sinkhorn-Knopp as one bias against the dense published algorithm: sizes, dtypes, hard norms, and rows over ranks.

Every case of several ranks runs with the same code on the ranks and alone; all share one spawn.

Legend: R teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from tests.fuzz.statements.dino import exact_log_vmf_constant
from tests.fuzz.statements.sinkhorn import published_sinkhorn_knopp
from tests.measure import allocations_of
from tests.on_ranks import start_ranks
from vmf_kernels import PrototypeLogits
from vmf_kernels.centering.sinkhorn import SinkhornKnopp
from vmf_kernels.prototypes import Prototypes

DIM = 24
TAU = 0.07
BUDGETS = {torch.float64: 1e-12, torch.float32: 1e-6}  # largest difference of a target's probability
KINDS = ["linear", "weight_norm_vmf"]
OUTPUTS = ["unstored", "stored"]


def teacher_logits(
    rows: int,
    prototypes: int,
    *,
    kind: str = "weight_norm_vmf",
    norm: float = 1.0,
    skew: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> PrototypeLogits:
    """Unit rows that share a direction of length ``skew``, before any view of an image is told from another."""
    shared = functional.normalize(torch.randn(DIM, dtype=torch.float64), dim=0)
    features = functional.normalize(
        functional.normalize(torch.randn(rows, DIM, dtype=torch.float64), dim=1) + skew * shared, dim=1
    )
    direction = functional.normalize(torch.randn(prototypes, DIM, dtype=torch.float64), dim=1)
    magnitude = norm * (0.8 + 0.4 * torch.rand(prototypes, 1, dtype=torch.float64))
    if kind == "linear":
        stored = Prototypes((magnitude * direction).to(dtype), None, kind)
    else:
        stored = Prototypes(direction.to(dtype), magnitude.to(dtype), kind)
    return PrototypeLogits(features.to(dtype), stored)


def normalizer_of(teacher: PrototypeLogits) -> Tensor | None:
    """[K] nats that the stored logits lack."""
    prototypes = teacher.prototypes
    if not prototypes.has_normalizer:
        return None
    return exact_log_vmf_constant(prototypes.norms().double() / TAU, DIM).to(prototypes.weight.dtype)


def logits_of(teacher: PrototypeLogits) -> Tensor:
    """[R, K] over temperature, in the teacher's dtype."""
    bias = normalizer_of(teacher)
    logits = teacher.materialize() / TAU
    return logits if bias is None else logits + bias


def targets_of(sinkhorn: SinkhornKnopp, teacher: PrototypeLogits, output: str = "unstored") -> Tensor:
    """[R, K] targets with the dual vector as bias."""
    if output == "unstored":
        dual = sinkhorn.target_bias(teacher, TAU)
    else:
        dual = sinkhorn.target_bias(teacher.materialize(), TAU, normalizer_of(teacher))
    return (logits_of(teacher) + dual).softmax(dim=1)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Infinite where shapes or dtypes differ or a value is not finite; 0 for no element."""
    if one.shape != other.shape or one.dtype != other.dtype or not one.isfinite().all():
        return float("inf")
    return float((one - other).abs().max()) if one.numel() else 0.0


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 1), (63, 127), (257, 1000), (1, 4099)])
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_targets_equal_the_published_ones(
    dtype: torch.dtype, prototypes: int, rows: int, kind: str, output: str
) -> None:
    teacher = teacher_logits(rows, prototypes, kind=kind, dtype=dtype)
    error = largest_difference(
        targets_of(SinkhornKnopp(), teacher, output), published_sinkhorn_knopp(logits_of(teacher))
    )
    assert error <= BUDGETS[dtype], f"largest difference {error:.1e}, budget {BUDGETS[dtype]:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["streaming", "reference"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_every_number_of_iterations_equals_the_published_ones(
    dtype: torch.dtype, iterations: int, backend: str
) -> None:
    teacher = teacher_logits(63, 127, dtype=dtype)
    got = targets_of(SinkhornKnopp(iterations, backend=backend), teacher)
    error = largest_difference(got, published_sinkhorn_knopp(logits_of(teacher), iterations))
    assert error <= BUDGETS[dtype], f"largest difference {error:.1e}, budget {BUDGETS[dtype]:.0e}"
    other = largest_difference(got, published_sinkhorn_knopp(logits_of(teacher), iterations + 1))
    assert other > 100 * BUDGETS[dtype], f"one iteration more differs by {other:.1e} only: the comparison says little"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("rows", "prototypes", "kind"), [(17, 67, "weight_norm_vmf"), (1, 40, "linear"), (0, 40, "linear")]
)
def test_kernels_give_the_published_targets(rows: int, prototypes: int, kind: str) -> None:
    teacher = teacher_logits(rows, prototypes, kind=kind, dtype=torch.float32)
    got = targets_of(SinkhornKnopp(backend="triton"), teacher)
    error = largest_difference(got, published_sinkhorn_knopp(logits_of(teacher)))
    assert error <= 1e-6, f"largest difference {error:.1e}, budget 1e-06"


def test_many_rounds_give_every_prototype_the_same_mass() -> None:
    teacher = teacher_logits(257, 40)
    few, many = (targets_of(SinkhornKnopp(rounds), teacher).mean(dim=0) * 40 - 1 for rounds in (1, 400))
    error, before = many.abs().max().item(), few.abs().max().item()
    assert error <= 1e-9, f"the mass of a prototype is off by {error:.1e} of the mean, budget 1e-09"
    assert before > 0.1, f"after one round it is off by {before:.1e}: the batch was even from the start"


@pytest.mark.parametrize("output", OUTPUTS)
def test_taking_each_row_s_maximum_off_gives_other_targets(output: str) -> None:
    """Trap T7, a negative control: ``exp(l - max_k l)`` scales rows before the prototypes' first turn."""
    teacher = teacher_logits(257, 1000, norm=2.0)
    logits = logits_of(teacher)
    ours = targets_of(SinkhornKnopp(), teacher, output)
    changed = published_sinkhorn_knopp(logits - logits.amax(dim=1, keepdim=True))
    shifted = published_sinkhorn_knopp(logits - logits.max())
    error, distance = largest_difference(ours, shifted), 0.5 * (ours - changed).abs().sum(dim=1).mean().item()
    assert error <= 1e-12, f"one maximum of all rows is off by {error:.1e}, budget 1e-12"
    assert distance > 1e-2, f"with each row's own the targets move by {distance:.1e} in total variation"


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_norms_at_which_the_published_algorithm_overflows(dtype: torch.dtype, output: str) -> None:
    """Trap T8: logits of some hundred, whose ``exp`` only fp64 can hold."""
    teacher = teacher_logits(63, 127, kind="linear", norm=30.0, dtype=dtype)
    exact_teacher = PrototypeLogits(
        teacher.features.double(), Prototypes(teacher.prototypes.weight.double(), None, "linear")
    )
    logits = logits_of(exact_teacher)
    assert 90 < logits.max() < 700, f"the largest logit is {logits.max():.0f}"
    assert published_sinkhorn_knopp(logits.float()).isnan().any(), "the published algorithm did not overflow in fp32"
    exact = published_sinkhorn_knopp(logits)
    got = targets_of(SinkhornKnopp(), teacher, output).double()
    # a logit of 400 is known to 3e-5 in fp32, and a probability to as much of itself
    budget = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps * logits.abs().max().item()
    error = largest_difference(got, exact)
    assert error <= budget, f"largest difference {error:.1e}, budget {budget:.1e}"


@pytest.mark.parametrize("output", OUTPUTS)
def test_norms_at_which_fp64_overflows_too(output: str) -> None:
    got = targets_of(SinkhornKnopp(), teacher_logits(63, 127, kind="linear", norm=1e3, dtype=torch.float32), output)
    assert got.isfinite().all()
    error = (got.sum(dim=1) - 1).abs().max().item()
    assert error <= 1e-5, f"a target sums to 1 but for {error:.1e}"


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_offset_of_every_logit_changes_nothing(output: str) -> None:
    teacher = teacher_logits(63, 127)
    stored, bias = teacher.materialize(), normalizer_of(teacher)
    plain = SinkhornKnopp().target_bias(stored, TAU, bias).softmax(dim=0)
    moved = SinkhornKnopp().target_bias(stored + 500 * TAU, TAU, bias).softmax(dim=0)
    error = largest_difference(moved, plain)
    assert error <= 1e-12, f"largest difference {error:.1e}, budget 1e-12"


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", ["streaming", "reference"])
def test_no_rows_give_a_bias_of_zero(backend: str, output: str) -> None:
    teacher = teacher_logits(0, 127, dtype=torch.float32)
    given = teacher if output == "unstored" else teacher.materialize()
    dual = SinkhornKnopp(backend=backend).target_bias(given, TAU)
    assert dual.shape == (127,)
    assert dual.eq(0).all()


def test_stored_logits_of_any_number_of_dims_are_rows() -> None:
    """Of three dims, K twice: taken for rows and prototypes, the wrong two would fit."""
    logits = teacher_logits(24, 12).materialize()
    expected = SinkhornKnopp().target_bias(logits, TAU)
    for shape in ((2, 12, 12), (1, 24, 12)):
        assert torch.equal(SinkhornKnopp().target_bias(logits.view(shape), TAU), expected)


def test_a_view_of_rows_counts_as_its_rows() -> None:
    teacher = teacher_logits(12, 127)
    viewed = teacher.unflatten(0, (3, 4))
    assert torch.equal(SinkhornKnopp()(viewed, TAU), SinkhornKnopp()(teacher, TAU))


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
def test_nothing_is_differentiated_or_remembered(output: str) -> None:
    teacher = teacher_logits(12, 127)
    teacher.features.requires_grad_()
    teacher.prototypes.weight.requires_grad_()
    sinkhorn = SinkhornKnopp()
    given, bias = (teacher, None) if output == "unstored" else (teacher.materialize(), normalizer_of(teacher))
    before = sinkhorn.target_bias(given, TAU, bias)
    sinkhorn.accumulate(given, TAU, bias)
    sinkhorn.apply_pending()
    assert not before.requires_grad
    assert not sinkhorn.state_dict()
    assert torch.equal(sinkhorn.target_bias(given, TAU, bias), before)


def test_no_plan_is_stored() -> None:
    rows, prototypes = 2048, 16_384
    teacher = PrototypeLogits(torch.randn(rows, 8), Prototypes(torch.randn(prototypes, 8), None, "linear"))
    peak, plan = allocations_of(lambda: SinkhornKnopp(1).target_bias(teacher, TAU)).peak, rows * prototypes * 4
    assert peak < plan / 3, f"{peak / 2**20:.0f} MiB at once where the plan takes {plan / 2**20:.0f}"


@pytest.mark.parametrize("output", OUTPUTS)
def test_it_compiles_whole(output: str) -> None:
    teacher, sinkhorn = teacher_logits(12, 127), SinkhornKnopp()
    stored, bias = teacher.materialize(), normalizer_of(teacher)

    def dual(features: Tensor, logits: Tensor) -> Tensor:
        if output == "stored":
            return sinkhorn.target_bias(logits, TAU, bias)
        return sinkhorn.target_bias(PrototypeLogits(features, teacher.prototypes), TAU)

    torch.compiler.reset()
    compiled = torch.compile(dual, fullgraph=True, backend="aot_eager")(teacher.features, stored)
    error = largest_difference(compiled, dual(teacher.features, stored))
    assert error <= 1e-12, f"largest difference {error:.1e}, budget 1e-12"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: SinkhornKnopp(0), "iterations is 0; expected at least 1"),
        (lambda: SinkhornKnopp(backend="cublas"), "unknown backend 'cublas'"),
        (lambda: SinkhornKnopp()(teacher_logits(3, 5), 0.0), "teacher_temperature is 0.0|temperature is 0.0"),
        (lambda: SinkhornKnopp()(torch.randn(3, 5), -1.0), "temperature is -1.0; expected a number > 0"),
        (lambda: SinkhornKnopp()(torch.randn(3, 5), 1.0, torch.zeros(4)), "bias has 4 elements; expected one for each"),
        (lambda: SinkhornKnopp()(teacher_logits(3, 5), 1.0, torch.zeros(5)), "bias is given for PrototypeLogits"),
    ],
)
def test_a_mistake_is_said(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()  # type: ignore[operator]


RANKS = 3
# rows of each rank: over all three, and over the first two
SPLITS = {"unequal": (5, 2, 4), "one-without": (7, 0, 4), "last-only": (0, 0, 11), "none": (0, 0, 0)}
PAIR_SPLITS = {"pair-unequal": (9, 2), "pair-one-without": (0, 11)}


def rank_targets(rank: int | None, pair: ProcessGroup | None = None) -> dict[str, Tensor]:
    """Dual vectors for the rows of one rank, or alone with all rows."""
    results = {}
    splits = SPLITS | (PAIR_SPLITS if rank is None or rank < 2 else {})
    for (name, split), output, dtype in itertools.product(splits.items(), OUTPUTS, BUDGETS):
        torch.manual_seed(3)
        teacher = teacher_logits(sum(split), 127, dtype=dtype)
        mine = slice(None) if rank is None else slice(sum(split[:rank]), sum(split[: rank + 1]))
        rows, group = teacher[mine], pair if name in PAIR_SPLITS else None
        given, bias = (rows, None) if output == "unstored" else (rows.materialize(), normalizer_of(rows))
        dual = SinkhornKnopp(row_group=group).target_bias(given, TAU, bias)
        results[f"{name} {output} {dtype}"] = (logits_of(teacher) + dual).softmax(dim=1)
    return results


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pair = torch.distributed.new_group([0, 1])
    torch.save(rank_targets(rank, pair if rank < 2 else None), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return rank_targets(None)


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("split", [*SPLITS, *PAIR_SPLITS])
def test_rows_over_ranks_give_the_targets_of_all_rows(
    ranks: list[dict[str, Tensor]], alone: dict[str, Tensor], split: str, output: str, dtype: torch.dtype
) -> None:
    name = f"{split} {output} {dtype}"
    expected = alone[name]
    present = [results[name] for results in ranks if name in results]
    assert len(present) == (2 if split in PAIR_SPLITS else RANKS)
    for got in present:
        error = largest_difference(got, expected)
        assert error <= BUDGETS[dtype], f"largest difference {error:.1e}, budget {BUDGETS[dtype]:.0e}"
        assert torch.equal(got, present[0]), "the ranks disagree"


def test_a_rank_s_own_rows_give_other_targets() -> None:
    """Negative control of the one above: the dual vector of the first rank's rows alone."""
    torch.manual_seed(3)
    teacher = teacher_logits(sum(SPLITS["unequal"]), 127)
    duals = [SinkhornKnopp().target_bias(rows, TAU) for rows in (teacher, teacher[: SPLITS["unequal"][0]])]
    difference = largest_difference(*((logits_of(teacher) + dual).softmax(dim=1) for dual in duals))
    assert difference > 1e-2, f"the targets move by {difference:.1e} only"
