"""Judging features and heads, against formulas written out row by row and cases with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vmf_kernels import DINOHead, DINOvMFHead, log_vmf_constant
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation import linear, nearest, prototypes
from vmf_pretrain.evaluation.features import extract_features
from vmf_pretrain.evaluation.knn import knn_accuracy
from vmf_pretrain.evaluation.linear import linear_accuracy
from vmf_pretrain.evaluation.prototypes import HeadReport, batch_information, report_head
from vmf_pretrain.evaluation.rank import rankme
from vmf_pretrain.methods.method import Assignment

pytestmark = pytest.mark.quick

IN_DIM = 6
PROTOTYPES = 12
TEMPERATURE = 0.1


def blobs(rows: int, classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """[N, IN_DIM] rows of any norm around one direction per class; the directions are the same for every seed."""
    centers = torch.randn(classes, IN_DIM, generator=torch.Generator().manual_seed(99))
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=source)
    features = centers[labels] + spread * torch.randn(rows, IN_DIM, generator=source)
    return features * (0.1 + 5 * torch.rand(rows, 1, generator=source)), labels


# k-NN


def votes_one_by_one(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: int, temperature: float
) -> float:
    correct = 0
    for row, label in zip(test.double(), test_labels.tolist(), strict=True):
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in train.double()]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:neighbours]
        votes: dict[int, float] = {}
        for i in nearest:
            voted = int(train_labels[i])
            votes[voted] = votes.get(voted, 0.0) + math.exp(cosines[i] / temperature)
        correct += max(votes, key=lambda c: votes[c]) == label
    return 100.0 * correct / len(test)


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0)])
def test_knn_equals_votes_counted_one_by_one(
    neighbours: int, temperature: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "ROWS_AT_ONCE", block)
    train, test = blobs(60, 4, 1.0, seed=1), blobs(41, 4, 1.0, seed=2)
    got = knn_accuracy(*train, *test, neighbours=neighbours, temperature=temperature)
    expected = votes_one_by_one(*train, *test, neighbours, temperature)
    assert 30 < expected < 100, f"the case tells nothing apart: {expected} %"
    assert got == pytest.approx(expected), f"{got} % instead of {expected} %"


def test_near_neighbours_outvote_many_far_ones() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    near_zero, zero = torch.tensor([[1.0, 0.2]]), torch.tensor([0])
    sharp = knn_accuracy(train, labels, near_zero, zero, neighbours=4, temperature=0.07)
    flat = knn_accuracy(train, labels, near_zero, zero, neighbours=4, temperature=100.0)
    assert (sharp, flat) == (100.0, 0.0), f"sharp votes give {sharp} %, flat ones {flat} %"


def test_a_small_temperature_does_not_overflow() -> None:
    train, test = blobs(60, 3, 0.5, seed=1), blobs(30, 3, 0.5, seed=2)
    nearest_alone = knn_accuracy(*train, *test, neighbours=1, temperature=1.0)
    sharp = knn_accuracy(*train, *test, neighbours=20, temperature=1e-6)
    assert sharp == nearest_alone, f"{sharp} % instead of the nearest neighbour's {nearest_alone} %"


def test_neighbours_are_capped_at_the_training_rows() -> None:
    train, test = blobs(8, 2, 0.5, seed=1), blobs(30, 2, 0.5, seed=2)
    capped = knn_accuracy(*train, *test, neighbours=20, temperature=0.07)
    all_of_them = knn_accuracy(*train, *test, neighbours=8, temperature=0.07)
    assert capped == all_of_them, f"{capped} % instead of {all_of_them} %"


def test_labels_need_not_count_from_zero_and_an_unseen_class_is_wrong() -> None:
    train, labels = blobs(60, 2, 0.01, seed=1)
    test, test_labels = blobs(40, 2, 0.01, seed=2)
    named = torch.tensor([-5, 1000])
    unseen = named[test_labels].clone()
    unseen[:10] = 7
    got = knn_accuracy(train, named[labels], test, unseen, neighbours=5, temperature=0.07)
    assert got == 75.0, f"{got} % instead of 75 %"


@pytest.mark.parametrize(
    ("train", "labels", "test", "message"),
    [
        ((4, 3), 4, (2, 5), "train features have 3 columns but test features 5"),
        ((4, 3), 3, (2, 3), r"train features have shape \(4, 3\) and labels \(3,\)"),
        ((0, 3), 0, (2, 3), r"train features have shape \(0, 3\)"),
        ((4, 3), 4, (0, 3), r"test features have shape \(0, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    train: tuple[int, int], labels: int, test: tuple[int, int], message: str
) -> None:
    split = (torch.randn(train), torch.zeros(labels).long(), torch.randn(test), torch.zeros(test[0]).long())
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*split, neighbours=1, temperature=0.1)
    with pytest.raises(ValueError, match=message):
        linear_accuracy(*split)


@pytest.mark.parametrize(("neighbours", "temperature"), [(0, 0.1), (1, 0.0), (1, math.nan)])
def test_neighbours_and_temperature_must_be_positive(neighbours: int, temperature: float) -> None:
    with pytest.raises(ValueError, match="both must be greater than 0"):
        knn_accuracy(*blobs(5, 2, 1.0, 1), *blobs(5, 2, 1.0, 2), neighbours=neighbours, temperature=temperature)


# Linear probe


def test_the_linear_probe_separates_what_a_plane_separates_whatever_the_scale() -> None:
    train, test = torch.randn(300, 4), torch.randn(200, 4)
    scale, shift = torch.tensor([1e-4, 1.0, 1e3, 5.0]), torch.tensor([7.0, 0.0, -1e4, 1.0])
    accuracy = linear_accuracy(
        train * scale + shift, (train[:, 0] > 0).long(), test * scale + shift, (test[:, 0] > 0).long()
    )
    assert accuracy > 95, f"{accuracy} %"


def test_the_linear_probe_finds_nothing_in_noise() -> None:
    accuracy = linear_accuracy(
        torch.randn(300, 4), torch.randint(2, (300,)), torch.randn(400, 4), torch.randint(2, (400,))
    )
    assert 35 < accuracy < 65, f"{accuracy} %"


def test_the_linear_probe_is_deterministic() -> None:
    train, test = blobs(120, 4, 1.5, seed=1), blobs(80, 4, 1.5, seed=2)
    first = linear_accuracy(*train, *test)
    torch.manual_seed(5)
    second = linear_accuracy(*train, *test)
    assert first == second, f"{first} % and then {second} %"


def test_a_probe_that_has_not_settled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "PROBE_ITERATIONS", 2)
    with pytest.warns(UserWarning, match="probe of 6 features had not settled after 2 iterations") as caught:
        linear_accuracy(*blobs(120, 4, 1.5, seed=1), *blobs(80, 4, 1.5, seed=2))
    assert len(caught) == 1, [str(warning.message) for warning in caught]


def test_a_single_class_cannot_be_probed() -> None:
    features, labels = blobs(5, 2, 1.0, 1)
    with pytest.raises(PretrainError, match="5 training images of 1 class"):
        linear_accuracy(features, torch.zeros_like(labels), features, labels)


# RankMe


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_their_number(rank: int) -> None:
    left, _ = torch.linalg.qr(torch.randn(20, rank).double())
    right, _ = torch.linalg.qr(torch.randn(8, rank).double())
    got = rankme(3.0 * left @ right.T)
    assert got == pytest.approx(rank, rel=1e-9), f"{got} instead of {rank}"


def test_rankme_of_unequal_singular_values_is_exp_of_their_entropy() -> None:
    got = rankme(torch.diag(torch.tensor([6.0, 3.0, 1.0])))
    expected = math.exp(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1)))
    assert got == pytest.approx(expected, rel=1e-9), f"{got} instead of {expected}"


def test_rankme_of_collapsed_features_is_one_and_of_none_zero() -> None:
    constant, nothing = rankme(torch.ones(50, 8)), rankme(torch.zeros(50, 8))
    assert constant == pytest.approx(1.0, abs=1e-6), f"constant features have {constant}"
    assert nothing == 0.0, f"features of 0 have {nothing}"


def test_rankme_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"shape \(0, 4\)"):
        rankme(torch.zeros(0, 4))


# Features


class NoisyBackbone(nn.Module):
    """Draws random numbers and averages over the batch in training mode; one part is kept in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.frozen(self.drop(self.norm(images.flatten(1))))
        return features


def test_features_of_all_batches_come_in_order_without_gradient() -> None:
    backbone, images = NoisyBackbone(), torch.randn(7, 1, 2, 2)
    features = extract_features(backbone, iter(images.split(3)))
    expected = images.flatten(1) / math.sqrt(1 + backbone.norm.eps)
    assert not features.requires_grad, "features carry a graph"
    error = (features - expected).abs().max().item()
    assert error < 1e-6, f"features are off by {error}"


def test_extracting_leaves_modes_statistics_and_random_numbers_alone() -> None:
    backbone = NoisyBackbone().train()
    backbone.frozen.eval()
    before, random_state = {k: v.clone() for k, v in backbone.state_dict().items()}, torch.get_rng_state()
    extract_features(backbone, [torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))])
    modes = (backbone.training, backbone.norm.training, backbone.drop.training, backbone.frozen.training)
    assert modes == (True, True, True, False), f"modes are now {modes}"
    assert torch.equal(torch.get_rng_state(), random_state), "the global generator moved"
    changed = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"{changed} changed"


def test_modes_come_back_after_an_error() -> None:
    backbone = NoisyBackbone().train()
    with pytest.raises(RuntimeError, match="running_mean"):
        extract_features(backbone, [torch.randn(5, 1, 3, 3)])
    assert backbone.drop.training, "dropout stayed in evaluation mode"


def test_broken_features_are_an_error() -> None:
    images = torch.randn(6, 1, 2, 2)
    images[2, 0, 1, 1], images[4, 0, 0, 0] = math.nan, math.inf
    with pytest.raises(PretrainError, match="NaN or infinite for 2 of 6 images"):
        extract_features(NoisyBackbone(), images.split(4))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        extract_features(NoisyBackbone(), [])


# Heads


def some_head(head_class: type[DINOHead] = DINOHead, *, use_bn: bool = False) -> DINOHead:
    """A head with prototypes of unlike norms, of which two point the same way."""
    head = head_class(IN_DIM, PROTOTYPES, use_bn=use_bn, hidden_dim=16, bottleneck_dim=5)
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.normal_()
        head.last_layer.weight_g.uniform_(0.5, 3.0)
        head.last_layer.weight_v[7] = 2.0 * head.last_layer.weight_v[3]
    return head


def written_out(head: DINOHead, features: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
    """[N, K] fp64 probabilities of a head in evaluation mode."""
    with torch.no_grad():
        logits: Tensor = head.eval()(features).materialize().double() / temperature
        norms = head.last_layer.weight_g.double().abs().flatten()
    if isinstance(head, DINOvMFHead):
        logits = logits + log_vmf_constant(norms / temperature, 5)
    return (logits if bias is None else logits + bias.double()).softmax(dim=1)


def entropy(q: Tensor) -> Tensor:
    return -torch.xlogy(q, q).sum(dim=-1)


@pytest.mark.parametrize("rows_at_once", [3, 64])
@pytest.mark.parametrize("biased", [False, True], ids=["uncentred", "centred"])
@pytest.mark.parametrize("head_class", [DINOHead, DINOvMFHead])
def test_a_report_equals_the_probabilities_written_out(
    head_class: type[DINOHead], biased: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "LOGIT_ROWS_AT_ONCE", rows_at_once)
    head, features = some_head(head_class, use_bn=True), torch.randn(50, IN_DIM)
    bias = 2 * torch.randn(PROTOTYPES) if biased else None
    report = report_head(Assignment(head, TEMPERATURE, bias), features, threshold=0.025)
    q = written_out(head, features, TEMPERATURE, bias)
    expected = {
        "mutual_information": (entropy(q.mean(0)) - entropy(q).mean()).item(),
        "teacher_entropy": entropy(q).mean().item(),
        "usage_entropy": entropy(q.mean(0)).item(),
        "prototypes_used": q.argmax(1).unique().numel(),
        "unique_prototypes": PROTOTYPES - 1,
        "largest_duplicate_share": 2 / PROTOTYPES,
    }
    got = {name: getattr(report, name) for name in expected}
    assert got == pytest.approx(expected, abs=2e-5), f"got {got}; expected {expected}"
    assert 1 < expected["prototypes_used"] < PROTOTYPES, f"{expected['prototypes_used']} used tells nothing apart"
    error = (report.usage - q.mean(0)).abs().max().item()
    assert error < 1e-5, f"usage is off by {error}"
    assert torch.equal(report.norms, head.last_layer.weight_g.detach().abs().flatten()), f"norms are {report.norms}"


def test_normaliser_and_bias_change_which_prototypes_are_used() -> None:
    heads, features = {kind: some_head(kind) for kind in (DINOHead, DINOvMFHead)}, torch.randn(50, IN_DIM)
    heads[DINOvMFHead].load_state_dict(heads[DINOHead].state_dict())
    favoured = torch.full((PROTOTYPES,), -1e4)
    favoured[5] = 0.0

    usages = [
        report_head(Assignment(head, TEMPERATURE, None), features, threshold=0.025).usage for head in heads.values()
    ]
    shift = (usages[0] - usages[1]).abs().max().item()
    assert shift > 0.01, f"the normaliser moves usage by only {shift}"
    alone = report_head(Assignment(heads[DINOvMFHead], TEMPERATURE, favoured), features, threshold=0.025)
    assert alone.prototypes_used == 1, f"{alone.prototypes_used} used"
    assert alone.usage[5].item() == pytest.approx(1.0), f"usage is {alone.usage}"


def report_of_logits(scale: float, features: Tensor) -> HeadReport:
    """Of a head whose prototypes are the axes, on features that are the axes."""
    head = DINOHead(5, 5, norm_last_layer=False, nlayers=1, bottleneck_dim=5)
    assert isinstance(head.mlp, nn.Linear)
    with torch.no_grad():
        head.mlp.weight.copy_(torch.eye(5))
        head.last_layer.weight_v.copy_(torch.eye(5))
        head.last_layer.weight_g.fill_(scale)
    return report_head(Assignment(head, 0.04, None), features, threshold=0.025)


@pytest.mark.parametrize(
    ("scale", "features", "teacher", "information", "used"),
    [
        (4.0, torch.eye(5).repeat(4, 1), 0.0, math.log(5), 5),
        (4.0, torch.eye(5)[:1].repeat(9, 1), 0.0, 0.0, 1),
        (0.0, torch.eye(5), math.log(5), 0.0, 1),
    ],
    ids=["one-prototype-per-class", "one-hot-collapse", "uniform-collapse"],
)
def test_the_report_tells_health_from_both_collapses(
    scale: float, features: Tensor, teacher: float, information: float, used: int
) -> None:
    report = report_of_logits(scale, features)
    got = (report.teacher_entropy, report.mutual_information, report.prototypes_used)
    assert got == pytest.approx((teacher, information, used), abs=1e-5), f"entropy, information, used: {got}"


def test_a_report_leaves_the_head_alone() -> None:
    head = some_head(DINOvMFHead, use_bn=True).train()
    before, random_state = {k: v.clone() for k, v in head.state_dict().items()}, torch.get_rng_state()
    features = torch.randn(20, IN_DIM, generator=torch.Generator().manual_seed(1))
    report = report_head(Assignment(head, TEMPERATURE, torch.zeros(PROTOTYPES)), features, threshold=0.025)
    assert all(part.training for part in head.modules()), "a part stayed in evaluation mode"
    assert torch.equal(torch.get_rng_state(), random_state), "the global generator moved"
    changed = [name for name, value in head.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"{changed} changed"
    assert not report.usage.requires_grad, "usage carries a graph"
    assert not report.norms.requires_grad, "norms carry a graph"
    assert all(parameter.grad is None for parameter in head.parameters()), "a parameter has a gradient"


@pytest.mark.parametrize("head_class", [DINOHead, DINOvMFHead])
def test_information_of_batches_equals_the_probabilities_written_out(head_class: type[DINOHead]) -> None:
    head, features, bias = some_head(head_class, use_bn=True), torch.randn(50, IN_DIM), 2 * torch.randn(PROTOTYPES)
    got = batch_information(Assignment(head, TEMPERATURE, bias), features, rows=20)
    parts = [written_out(head, features[start : start + 20], TEMPERATURE, bias) for start in (0, 20)]
    expected = [(entropy(q.mean(0)) - entropy(q).mean()).item() for q in parts]
    assert got == pytest.approx(expected, abs=2e-5), f"got {got}; expected {expected}"


@pytest.mark.parametrize(("rows", "batches"), [(50, 1), (51, 0), (7, 7), (1, 50)])
def test_information_is_of_whole_batches_only(rows: int, batches: int) -> None:
    got = batch_information(Assignment(some_head(), TEMPERATURE, None), torch.randn(50, IN_DIM), rows=rows)
    assert len(got) == batches
    assert all(abs(value) < 1e-5 for value in got) == (rows == 1 or not got), f"{got} of batches of {rows}"
