"""How good features are, and whether a head has collapsed: k-NN, linear probe, RankMe, usage of the prototypes.

Legend: N training rows (or images), M test rows, F feature dim, C classes, K prototypes, D bottleneck dim.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from vmf_kernels import (
    AssignmentStatistics,
    DINOHead,
    PrototypeLogits,
    Prototypes,
    prototype_cross_entropy,
    unique_prototypes,
)
from vmf_pretrain.errors import PretrainError

TEST_ROWS_AT_ONCE = 256  # of cosines: 50 MiB of fp32 against 50,000 training rows
LOGIT_ROWS_AT_ONCE = 64  # of stored logits: 16 MiB of fp32 at K = 65,536
PROBE_ITERATIONS = 1000  # of L-BFGS; a warning says if that was too few


@dataclass(frozen=True, eq=False)
class HeadReport:
    """How a head assigns a set of images to prototypes; entropies in nats, at most ``ln K``.

    Attributes:
        mutual_information: between images and prototypes, ``usage_entropy - teacher_entropy``; near 0, the head has collapsed.
        teacher_entropy: mean entropy of an image's distribution over prototypes; near 0 is one-hot, near ``ln K`` uniform.
        usage: [K] mean probability of each prototype over the images, float32; sums to 1.
        usage_entropy: entropy of ``usage``.
        prototypes_used: prototypes that are the most probable one of at least one image.
        unique_prototypes: prototypes, counting each set of near-duplicates in direction once.
        largest_duplicate_share: share of all prototypes in the largest group of duplicates; 1 / K without any.
        norms: [K] norms of the prototypes, float32; divided by the temperature they are the vMF concentrations.
    """

    mutual_information: float
    teacher_entropy: float
    usage: Tensor
    usage_entropy: float
    prototypes_used: int
    unique_prototypes: int
    largest_duplicate_share: float
    norms: Tensor


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, neighbours: int, temperature: float
) -> float:
    """Accuracy of the weighted k-NN classifier on cosine similarity, in percent.

    Each of the ``neighbours`` most similar training rows votes ``exp(cosine / temperature)`` for its class.

    Args:
        train: [N, F] features, floating point, of any norm.
        train_labels: [N] integers.
        test: [M, F] features.
        test_labels: [M] integers; a row whose class is not among the training labels counts as wrong.
        neighbours: k; if N is smaller, all N.
        temperature: positive.

    Raises:
        ValueError: shapes do not fit, or ``neighbours`` or ``temperature`` is not positive.
    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4.
    """
    _check_split(train, train_labels, test, test_labels)
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"neighbours is {neighbours} and temperature {temperature}; both must be greater than 0")
    classes_C, class_N = torch.unique(train_labels, return_inverse=True)
    train_NF = functional.normalize(train.float(), dim=1)
    correct = 0
    for rows, labels in zip(
        torch.split(test, TEST_ROWS_AT_ONCE), torch.split(test_labels, TEST_ROWS_AT_ONCE), strict=True
    ):
        cosines = functional.normalize(rows.float(), dim=1) @ train_NF.T
        nearest, index = cosines.topk(min(neighbours, train.shape[0]), dim=1)
        votes = ((nearest - nearest[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        counts = votes.new_zeros(rows.shape[0], classes_C.shape[0]).scatter_add_(1, class_N[index], votes)
        correct += int((classes_C[counts.argmax(dim=1)] == labels).sum())
    return 100.0 * correct / test.shape[0]


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a logistic regression on standardised features, in percent; deterministic (L-BFGS from zero).

    Arguments and errors as ``knn_accuracy``.

    Raises:
        PretrainError: the training labels have only one class.
    """
    _check_split(train, train_labels, test, test_labels)
    if torch.unique(train_labels).shape[0] < 2:
        raise PretrainError(
            f"The linear probe got {train.shape[0]} training images of 1 class but needs at least 2 classes."
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the warning below says it
        probe.fit(train.double().cpu().numpy(), train_labels.cpu().numpy())
    if int(probe[-1].n_iter_.max()) >= PROBE_ITERATIONS:
        warnings.warn(
            f"The linear probe of {train.shape[1]} features had not settled after {PROBE_ITERATIONS} iterations; "
            "its accuracy may be a little off.",
            stacklevel=2,
        )
    return 100.0 * float(probe.score(test.double().cpu().numpy(), test_labels.cpu().numpy()))


def rankme(features: Tensor) -> float:
    """Effective rank of features: exp of the entropy of the singular values divided by their sum.

    Args:
        features: [N, F] floating point, as they are (not centred).

    Returns:
        Between 1 and min(N, F), in dimensions; 0 if every feature is 0.

    Raises:
        ValueError: ``features`` is not a matrix with at least one row.
    Source: Garrido et al., "RankMe", ICML 2023, equation 1, without its epsilon inside the logarithm.
    """
    if features.ndim != 2 or not features.shape[0]:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [N, F] with N >= 1")
    singular = torch.linalg.svdvals(features.double())
    total = singular.sum()
    if total == 0:
        return 0.0
    return float(_entropy(singular / total).exp())


def extract_features(backbone: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """[N, F] float32 on the CPU: the backbone's features of every image, in evaluation mode, without random numbers.

    Args:
        backbone: maps [B, C, H, W] to [B, F]; the mode of every module is restored.
        batches: [B, C, H, W] images; moved to the backbone's device.

    Raises:
        PretrainError: a feature is NaN or infinite.
        ValueError: there is no batch.
    """
    device = device_of(backbone)
    with evaluating(backbone), torch.no_grad():
        parts = [backbone(images.to(device)).float().cpu() for images in batches]
    if not parts:
        raise ValueError("batches is empty; expected at least one batch of images")
    features = torch.cat(parts)
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise PretrainError(f"The backbone's features are NaN or infinite for {broken} of {features.shape[0]} images.")
    return features


@torch.no_grad()
def report_head(
    head: DINOHead, features: Tensor, temperature: float, bias: Tensor | None, *, threshold: float
) -> HeadReport:
    """How the head assigns ``features`` to prototypes, in evaluation mode; every image has the same weight.

    Args:
        head: the projection head; its prototypes add the vMF normaliser if they have one (``DINOvMFHead``). The mode of every
            module is restored.
        features: [N, F] of the backbone; moved to the head's device.
        temperature: the teacher's, positive.
        bias: [K] nats added to the logits (the centre's bias), or None.
        threshold: cosine distance below which two prototypes count as duplicates.

    Raises:
        ValueError: shapes or the temperature do not fit.
    """
    logits, on_device = _assigned(head, features, bias)
    prototypes = logits.prototypes
    statistics = _statistics(logits.features, prototypes, temperature, on_device)
    duplicates = unique_prototypes(prototypes.effective_weight(), threshold)
    return HeadReport(
        mutual_information=float(statistics.mutual_information),
        teacher_entropy=float(statistics.teacher_entropy),
        usage=statistics.usage.float().cpu(),
        usage_entropy=float(_entropy(statistics.usage.double())),
        prototypes_used=_count_used(logits, _log_prior(prototypes, temperature, on_device), temperature),
        unique_prototypes=duplicates.count,
        largest_duplicate_share=duplicates.largest_share,
        norms=prototypes.norms().float().cpu(),
    )


@torch.no_grad()
def batch_information(
    head: DINOHead, features: Tensor, temperature: float, bias: Tensor | None, *, rows: int
) -> list[float]:
    """Mutual information, in nats, of each consecutive batch of ``rows`` images, as a log of such batches would have it.

    It is at most ``ln rows``, and on average less than that of all images together. Arguments as ``report_head``. No image
    is in two batches; images left over are not used.
    """
    logits, on_device = _assigned(head, features, bias)
    prototypes = logits.prototypes
    starts = range(0, len(features) - rows + 1, rows)
    batches = (logits.features[start : start + rows] for start in starts)
    return [float(_statistics(batch, prototypes, temperature, on_device).mutual_information) for batch in batches]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for ``module`` and all its parts; on exit, the mode of each part is restored."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lives."""
    return next(module.parameters()).device


def _assigned(head: DINOHead, features: Tensor, bias: Tensor | None) -> tuple[PrototypeLogits, Tensor | None]:
    """Logits of features in evaluation mode, and the bias on their device."""
    device = device_of(head)
    with evaluating(head):
        logits: PrototypeLogits = head(features.to(device)).float()
    return logits, None if bias is None else bias.to(device)


def _statistics(
    rows_ND: Tensor, prototypes: Prototypes, temperature: float, bias: Tensor | None
) -> AssignmentStatistics:
    """Statistics of the teacher's rows: it is passed as both networks, because only the statistics are wanted."""
    return prototype_cross_entropy(
        rows_ND,
        prototypes,
        rows_ND,
        prototypes,
        torch.ones(1, 1),
        student_temperature=temperature,
        teacher_temperature=temperature,
        teacher_bias=bias,
    ).statistics


def _log_prior(prototypes: Prototypes, temperature: float, bias: Tensor | None) -> Tensor:
    """[K] nats that are added to the logits of every image: log-normaliser and bias."""
    norms = prototypes.norms()
    prior = torch.zeros_like(norms) if bias is None else bias.to(norms.dtype)
    if prototypes.has_normalizer:
        prior = prior + prototypes.log_normalizer(temperature)
    return prior


def _count_used(logits: PrototypeLogits, log_prior_K: Tensor, temperature: float) -> int:
    """How many prototypes are the most probable one of at least one row."""
    used = torch.zeros(log_prior_K.shape[0], dtype=torch.bool, device=log_prior_K.device)
    for rows in logits.split(LOGIT_ROWS_AT_ONCE):
        used[(rows.materialize() / temperature + log_prior_K).argmax(dim=-1)] = True
    return int(used.sum())


def _entropy(probabilities: Tensor) -> Tensor:
    """[] Shannon entropy, nats; 0 log 0 = 0."""
    return -torch.xlogy(probabilities, probabilities).sum()


def _check_split(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    for side, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or not features.shape[0] or tuple(labels.shape) != (features.shape[0],):
            raise ValueError(
                f"{side} features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; "
                "expected [N, F] and [N] with N >= 1"
            )
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train features have {train.shape[1]} columns but test features {test.shape[1]}")
