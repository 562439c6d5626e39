"""The drop-in for lightly against lightly's own classes: steps, state dicts, signatures, errors; and on two ranks.

Legend: B images, V crops, K prototypes, D bottleneck dim, M masked patches.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from tests.measure import relative_error, worst_error
from tests.published import follow
from vmf_kernels import PrototypeLogits, streams
from vmf_kernels.compat import lightly
from vmf_kernels.targets import target_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # what lightly's heads are made with

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, in norm, of each tensor of each step
SEEN = 100  # a broken formula must be off by so many budgets
STEPS, IMAGES, CROPS, GRID = 6, 3, 5, (3, 4)
IN_DIM, HIDDEN, DIM, PROTOTYPES = 12, 16, 24, 301
TEMPS: dict[str, Any] = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 4}
DTYPES = [pytest.param(torch.float64, id="fp64"), pytest.param(torch.float32, id="fp32")]
HEADS = ["our-head", "lightly-head"]
RANKS = 2
MASKED = {"unequal": (5, 2), "first-only": (6, 0), "second-only": (0, 6), "none": (0, 0)}  # patches of each rank

Record = dict[str, Tensor]
Step = Callable[[nn.Module, nn.Module, Tensor, int], Tensor]


@functools.cache
def published() -> Any:
    """lightly's own classes; imported late, for the ranks do without."""
    importlib.import_module("vmf_pretrain")  # lightly imports torchvision, which a CPU build of torch needs help with
    modules = [importlib.import_module(f"lightly.{name}") for name in ("loss", "models.modules.heads")]
    names = ("DINOLoss", "IBOTPatchLoss", "KoLeoLoss", "DINOProjectionHead", "DINOv2ProjectionHead")
    return SimpleNamespace(**{name: next(vars(m)[name] for m in modules if name in vars(m)) for name in names})


def our_network(dtype: torch.dtype, *, frozen: bool = False, batch_norm: bool = False) -> lightly.DINOProjectionHead:
    """A head whose features differ between rows, with norms between 0.5 and 1.5 of either sign unless frozen."""
    head = lightly.DINOProjectionHead(IN_DIM, HIDDEN, DIM, PROTOTYPES, batch_norm, norm_last_layer=frozen).double()
    with torch.no_grad():
        for layer in head.layers:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(
                    15
                )  # as small as they start, steps of fp32 drift apart, lightly's own from its fp64 too
        if not frozen:
            g = head.last_layer.weight_g
            g.copy_((0.5 + torch.rand_like(g)) * torch.randn_like(g).sign())
    return head.to(dtype)


def twin_of(head: nn.Module, dtype: torch.dtype, **options: Any) -> nn.Module:
    """lightly's head with the parameters of ours."""
    twin: nn.Module = published().DINOProjectionHead(IN_DIM, HIDDEN, DIM, PROTOTYPES, **options).to(dtype)
    twin.load_state_dict(head.state_dict())
    return twin


def train(student: nn.Module, teacher: nn.Module, loss: nn.Module, step: Step) -> Record:
    """Steps of momentum SGD, the teacher following; every loss, gradient and centre by step."""
    batches = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.02, momentum=0.5)
    dtype = next(student.parameters()).dtype
    teacher.requires_grad_(False)
    record: Record = {}
    for i in range(STEPS):
        x = torch.randn(CROPS, IMAGES, math.prod(GRID), IN_DIM, generator=batches, dtype=torch.float64)
        x = x.float().to(dtype).requires_grad_()
        optimizer.zero_grad()
        value = step(student, teacher, x, i)
        value.backward()
        assert x.grad is not None
        (center,) = loss.state_dict().values()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        measured = {"loss": value.detach(), "input": x.grad, "center": center.clone(), **gradients}
        record |= {f"step {i} {name}": tensor.clone() for name, tensor in measured.items()}
        optimizer.step()
        follow(teacher, student, 0.9)
    return record


def dino_step(loss: Any, given: str = "epoch") -> Step:
    """Crops of one token each, head by head as in lightly's examples."""

    def step(student: nn.Module, teacher: nn.Module, x: Tensor, i: int) -> Tensor:
        choices: dict[str, Any] = {"epoch": {"epoch": i}, "argument": {"teacher_temp": 0.03 + 0.01 * i}, "default": {}}
        teacher_out = [teacher(view.detach() + 0.1) for view in x[:2, :, 0]]
        student_out = [student(view) for view in x[:, :, 0]]
        return loss(teacher_out, student_out, **choices[given])  # type: ignore[no-any-return]

    return step


def masks(step: int) -> Tensor:
    """[B, H, W] of a step; the first image has none masked."""
    mask = torch.rand(2 * IMAGES, *GRID, generator=torch.Generator().manual_seed(step)) < 0.4
    mask[0] = False
    return mask


def patch_step(loss: Any) -> Step:
    def step(student: nn.Module, teacher: nn.Module, x: Tensor, i: int) -> Tensor:
        mask = masks(i)
        patches = x[:2].flatten(0, 1)[mask.flatten(1)]
        temperature = [None, 0.05][i % 2]
        return loss(teacher(patches.detach() + 0.1), student(patches), mask, temperature)  # type: ignore[no-any-return]

    return step


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Step], dict[str, Any]]] = {
    "DINOLoss": (lightly.DINOLoss, dino_step, TEMPS),
    "IBOTPatchLoss": (lightly.IBOTPatchLoss, patch_step, {"teacher_temp": 0.07}),
}


def error_over_steps(name: str, head: str, dtype: torch.dtype, *given: str, **changed: Any) -> tuple[float, str]:
    """The worst error against lightly in fp64 from the same numbers; ``changed`` options are of our side only."""
    make, step, options = LOSSES[name]
    frozen = changed.pop("frozen", False)
    networks = our_network(dtype, frozen=frozen), our_network(dtype, frozen=frozen)
    oracle = getattr(published(), name)(PROTOTYPES, **options).double()
    student, teacher = (twin_of(network, torch.float64, norm_last_layer=frozen) for network in networks)
    expected = train(student, teacher, oracle, step(oracle, *given))
    ours = make(PROTOTYPES, **(options | changed)).to(dtype)
    if head == "our-head":
        return worst_error(train(*networks, ours, step(ours, *given)), expected)
    student, teacher = (twin_of(network, dtype, norm_last_layer=frozen) for network in networks)
    return worst_error(train(student, teacher, ours, step(ours, *given)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_steps_equal_lightly_s(name: str, head: str, dtype: torch.dtype) -> None:
    error, quantity = error_over_steps(name, head, dtype)
    assert error <= BUDGET[dtype], f"{quantity}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize("given", ["argument", "default"])
def test_teacher_temperature_may_come_as_an_argument_or_from_the_constructor(given: str) -> None:
    error, quantity = error_over_steps("DINOLoss", "our-head", torch.float64, given)
    assert error <= 1e-10, f"{quantity}: relative error {error:.2e}, budget 1e-10"


@pytest.mark.parametrize("name", LOSSES)
def test_steps_with_frozen_norms_equal_lightly_s(name: str) -> None:
    error, quantity = error_over_steps(name, "our-head", torch.float64, frozen=True)
    assert error <= 1e-10, f"{quantity}: relative error {error:.2e}, budget 1e-10"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("DINOLoss", {"center_momentum": 0.8}),
        ("DINOLoss", {"student_temp": 0.11}),
        ("DINOLoss", {"warmup_teacher_temp_epochs": 3}),
        ("IBOTPatchLoss", {"center_momentum": 0.8}),
        ("IBOTPatchLoss", {"teacher_temp": 0.06}),
    ],
    ids=["momentum", "student-temp", "warm-up", "patch-momentum", "patch-temp"],
)
def test_a_changed_option_is_seen(name: str, changed: dict[str, Any]) -> None:
    """Negative control of the comparisons above."""
    error, _ = error_over_steps(name, "our-head", torch.float32, **changed)
    assert error > SEEN * BUDGET[torch.float32], f"relative difference {error:.2e}"


@pytest.mark.parametrize("seen_views", [(1, 2), (2, 2), (3, 2), (2, 5)])
def test_any_number_of_views_on_either_side_is_averaged_as_there(seen_views: tuple[int, int]) -> None:
    teacher_out, student_out = ([torch.randn(IMAGES, 50).double() for _ in range(n)] for n in seen_views)
    error = relative_error(
        lightly.DINOLoss(50)(teacher_out, student_out), published().DINOLoss(50)(teacher_out, student_out)
    )
    assert error <= 1e-10, f"relative error {error:.2e}, budget 1e-10"


@pytest.mark.parametrize("head", HEADS)
def test_all_pairs_take_one_operator_call(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mock(side_effect=target_cross_entropy)
    monkeypatch.setattr(streams, "target_cross_entropy", counted)
    network: nn.Module = our_network(torch.float32)
    loss = lightly.DINOLoss(PROTOTYPES)
    if head == "lightly-head":
        network = twin_of(network, torch.float32)
    dino_step(loss)(network, network, torch.randn(CROPS, IMAGES, 1, IN_DIM), 0)
    assert counted.call_count == 1


def test_no_gradient_reaches_the_teacher() -> None:
    """Unlike lightly, which the second half shows."""
    for make, gets in ((lightly.DINOLoss, False), (published().DINOLoss, True)):
        teacher_out = [torch.randn(IMAGES, 50, requires_grad=True) for _ in range(2)]
        make(50)(teacher_out, [torch.randn(IMAGES, 50, requires_grad=True) for _ in range(2)]).backward()
        assert (teacher_out[0].grad is not None) == gets


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_koleo_steps_equal_lightly_s(dtype: torch.dtype, p: float) -> None:
    records = []
    backbone = nn.Linear(6, 5)
    for loss, kind in ((lightly.KoLeoLoss(p), dtype), (published().KoLeoLoss(p), torch.float64)):
        model, random = copy.deepcopy(backbone).to(kind), torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        record: Record = {}
        for i in range(STEPS):
            optimizer.zero_grad()
            value = loss(model(torch.randn(7, 6, generator=random).to(kind)))
            value.backward()
            optimizer.step()
            gradients = {name: q.grad.clone() for name, q in model.named_parameters() if q.grad is not None}
            record |= {f"step {i} {name}": t for name, t in {"loss": value.detach(), **gradients}.items()}
        records.append(record)
    error, quantity = worst_error(*records)
    assert error <= BUDGET[dtype], f"{quantity}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


def test_koleo_of_another_norm_is_another_loss() -> None:
    """Negative control."""
    x = torch.randn(7, 6)
    assert relative_error(lightly.KoLeoLoss(1)(x), published().KoLeoLoss(2)(x)) > 1e-2


@pytest.mark.parametrize("name", LOSSES)
def test_center_goes_both_ways(name: str) -> None:
    make, step, options = LOSSES[name]
    ours, theirs = make(PROTOTYPES, **options), getattr(published(), name)(PROTOTYPES, **options)
    network = our_network(torch.float32)
    x = torch.randn(CROPS, IMAGES, math.prod(GRID), IN_DIM)
    step(ours)(network, network, x, 0)
    theirs.load_state_dict(ours.state_dict())
    (key, moved), *more = theirs.state_dict().items()
    assert not more
    assert moved.ne(0).any(), "the centre has not moved"
    again = make(PROTOTYPES, **options)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again.state_dict()[key], ours.state_dict()[key])
    assert again.state_dict()[key].shape == moved.shape


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["DINOProjectionHead", "DINOv2ProjectionHead"])
def test_heads_share_state_dicts_and_outputs(name: str, batch_norm: bool) -> None:
    sizes = (IN_DIM, HIDDEN, DIM, PROTOTYPES, batch_norm)
    theirs, ours, x = getattr(published(), name)(*sizes), getattr(lightly, name)(*sizes), torch.randn(9, IN_DIM)
    with torch.no_grad():
        theirs.last_layer.weight_g.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours(x), PrototypeLogits)
    torch.testing.assert_close(ours(x).materialize(), theirs(x))
    back = getattr(published(), name)(*sizes)
    assert (back(x) - theirs(x)).abs().max() > 1e-2, "the negative control, before loading, agrees"
    back.load_state_dict(copy.deepcopy(ours).state_dict())
    torch.testing.assert_close(back(x), theirs(x))
    flags = [{n: p.requires_grad for n, p in head.named_parameters()} for head in (ours, theirs)]
    assert flags[0] == flags[1]


def test_heads_start_as_there() -> None:
    theirs, ours = (package.DINOProjectionHead(64, 64, 32, 500).state_dict() for package in (published(), lightly))
    assert list(theirs) == list(ours)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].mean(), expected.mean(), atol=0.01, rtol=0)
        torch.testing.assert_close(ours[name].std(), expected.std(), atol=1e-7, rtol=0.1)


@pytest.mark.parametrize("make", [lambda: published().DINOProjectionHead, lambda: lightly.DINOProjectionHead])
def test_last_layer_rests_until_its_epoch(make: Callable[[], Any]) -> None:
    """Both sides, with gradients that were there before."""
    for epoch, rests in ((0, True), (1, True), (2, False)):
        head = make()(IN_DIM, HIDDEN, DIM, PROTOTYPES, freeze_last_layer=2, norm_last_layer=False)
        for parameter in head.parameters():
            parameter.grad = torch.ones_like(parameter)
        head.cancel_last_layer_gradients(current_epoch=epoch)
        gone = {name for name, p in head.named_parameters() if p.grad is None}
        assert gone == ({"last_layer.weight_g", "last_layer.weight_v"} if rests else set())


@pytest.mark.parametrize(
    "name", ["DINOLoss", "IBOTPatchLoss", "KoLeoLoss", "DINOProjectionHead", "DINOv2ProjectionHead"]
)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signature_starts_with_the_published_one(name: str, method: str) -> None:
    got, expected = (
        list(inspect.signature(getattr(getattr(package, name), method)).parameters.values())[1:]
        for package in (lightly, published())
    )
    if (name, method) == ("KoLeoLoss", "forward"):
        assert len(got) == len(expected) == 1  # its one argument has another name
        return
    assert [(p.name, p.default) for p in got[: len(expected)]] == [(p.name, p.default) for p in expected]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in got[len(expected) :])


def test_manual_update_moves_the_center_once() -> None:
    views = [torch.randn(IMAGES, 50) for _ in range(4)]
    manual, whole = lightly.DINOLoss(50, center_update="manual"), lightly.DINOLoss(50)
    for half in (views[:2], views[2:]):
        manual(half, half)
    assert manual.center.eq(0).all()
    manual.update_center()
    whole.update_center(torch.stack(views))
    torch.testing.assert_close(manual.center, whole.center)
    theirs = published().DINOLoss(50)
    theirs.update_center(torch.stack(views))
    torch.testing.assert_close(whole.center, theirs.center)


@pytest.mark.parametrize("output", ["unstored", "stored"])
def test_no_masked_patch_is_a_loss_of_zero(output: str) -> None:
    head, loss = our_network(torch.float32), lightly.IBOTPatchLoss(PROTOTYPES)
    rows = head(torch.randn(0, IN_DIM))
    rows = rows if output == "unstored" else rows.materialize()
    value = loss(rows.detach(), rows, torch.zeros(2, *GRID, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert loss.state_dict()["center.center"].eq(0).all()
    theirs = published().IBOTPatchLoss(PROTOTYPES)
    theirs(torch.randn(0, PROTOTYPES), torch.randn(0, PROTOTYPES), torch.zeros(2, *GRID, dtype=torch.bool))
    assert theirs.center.value.isnan().all(), "the README says that lightly's centre turns NaN"
    assert head.last_layer.weight_v.grad is None or head.last_layer.weight_v.grad.eq(0).all()


LOGITS = [torch.zeros(2, 9)] * 2
MASK = torch.tensor([[[True, False], [True, True]]])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lightly.DINOLoss(9, center_mode="median"), "center_mode is 'median'; expected one of mean"),
        (lambda: lightly.DINOLoss(9, teacher_temp=0.0), "teacher_temp is 0.0; expected a number > 0"),
        (lambda: lightly.DINOLoss(9)(LOGITS, LOGITS, 0.0), "teacher_temp is 0.0; expected a number > 0"),
        (lambda: lightly.DINOLoss(9)(LOGITS, LOGITS, epoch=-1), "epoch is -1; expected an int >= 0"),
        (lambda: lightly.DINOLoss(9)([], LOGITS), "got 0 teacher views and 2 student views; expected some of each"),
        (lambda: lightly.DINOLoss(9)(LOGITS[:1], LOGITS[:1]), "leave no pair of different views"),
        (
            lambda: lightly.DINOLoss(9)(LOGITS, [torch.zeros(3, 9)] * 2),
            "(2, 9), (2, 9), (3, 9), (3, 9); expected [B, K]",
        ),
        (lambda: lightly.DINOLoss(8)(LOGITS, LOGITS), "teacher output has 9 prototypes; expected out_dim = 8"),
        (lambda: lightly.IBOTPatchLoss(9, center_mode="x"), "center_mode is 'x'; expected one of mean"),
        (
            lambda: lightly.IBOTPatchLoss(9)(*LOGITS, MASK),
            "shape (2, 9) but the mask 3 masked patches; expected [3, K]",
        ),
        (
            lambda: lightly.IBOTPatchLoss(9)(*LOGITS, MASK.int()),
            "mask is torch.int32 of shape (1, 2, 2); expected bool",
        ),
        (lambda: lightly.KoLeoLoss(p=0), "p is 0; expected a number > 0"),
        (lambda: lightly.KoLeoLoss()(torch.zeros(1, 3)), "expected [B, D] with B >= 2"),
        (lambda: lightly.DINOProjectionHead(3, 0, 4, 5), "are 3, 0, 4, 5; expected at least 1, 1, 2 and 1"),
    ],
)
def test_a_mistake_is_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_a_stored_side_against_an_unstored_one_is_refused() -> None:
    head = our_network(torch.float32)
    rows = head(torch.randn(3, IN_DIM))
    with pytest.raises(TypeError, match="student output is PrototypeLogits but teacher output Tensor"):
        lightly.IBOTPatchLoss(PROTOTYPES)(rows.materialize(), rows, MASK)


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
    spawn(run_rank, (str(folder),), nprocs=RANKS)
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
