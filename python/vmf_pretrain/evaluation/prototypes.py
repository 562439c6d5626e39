"""How a head assigns images to prototypes, and whether it has collapsed.

Legend: N images, F feature dim, K prototypes, D bottleneck dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_kernels import (
    AssignmentStatistics,
    PrototypeLogits,
    Prototypes,
    prototype_cross_entropy,
    unique_prototypes,
)
from vmf_pretrain.evaluation.features import device_of, evaluating
from vmf_pretrain.evaluation.nearest import nearest
from vmf_pretrain.evaluation.rank import entropy
from vmf_pretrain.methods.method import Assignment

LOGIT_ROWS_AT_ONCE = 64  # of stored logits: 16 MiB of fp32 at K = 65,536


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


@torch.no_grad()
def report_head(assignment: Assignment, features: Tensor, *, threshold: float) -> HeadReport:
    """How the head assigns ``features`` to prototypes, in evaluation mode; every image has the same weight.

    Args:
        assignment: the head, its temperature and bias; the prototypes add the vMF normaliser if they have one
            (``DINOvMFHead``). The mode of every module is restored.
        features: [N, F] of the backbone; moved to the head's device.
        threshold: cosine distance below which two prototypes count as duplicates.

    Raises:
        ValueError: shapes or the temperature do not fit.
    """
    temperature = assignment.temperature
    logits, on_device = _assigned(assignment, features)
    prototypes = logits.prototypes
    statistics = _statistics(logits.features, prototypes, temperature, on_device)
    duplicates = unique_prototypes(prototypes.effective_weight(), threshold)
    return HeadReport(
        mutual_information=float(statistics.mutual_information),
        teacher_entropy=float(statistics.teacher_entropy),
        usage=statistics.usage.float().cpu(),
        usage_entropy=float(entropy(statistics.usage.double())),
        prototypes_used=_count_used(logits, _log_prior(prototypes, temperature, on_device), temperature),
        unique_prototypes=duplicates.count,
        largest_duplicate_share=duplicates.largest_share,
        norms=prototypes.norms().float().cpu(),
    )


@torch.no_grad()
def usage_and_norms(assignment: Assignment, features: Tensor) -> tuple[Tensor, Tensor]:
    """[K] mean probabilities of the prototypes over the images, and [K] norms, float32; arguments as ``report_head``."""
    logits, on_device = _assigned(assignment, features)
    statistics = _statistics(logits.features, logits.prototypes, assignment.temperature, on_device)
    return statistics.usage.float().cpu(), logits.prototypes.norms().float().cpu()


@torch.no_grad()
def batch_information(assignment: Assignment, features: Tensor, *, rows: int) -> list[float]:
    """Mutual information, in nats, of each consecutive batch of ``rows`` images, as a log of such batches would have it.

    It is at most ``ln rows``, and on average less than that of all images together. Arguments as ``report_head``. No image
    is in two batches; images left over are not used.
    """
    temperature = assignment.temperature
    logits, on_device = _assigned(assignment, features)
    prototypes = logits.prototypes
    starts = range(0, len(features) - rows + 1, rows)
    batches = (logits.features[start : start + rows] for start in starts)
    return [float(_statistics(batch, prototypes, temperature, on_device).mutual_information) for batch in batches]


@torch.no_grad()
def nearest_rows(assignment: Assignment, features: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines [n, k], descending, and places [n, k] of the rows [N, F] nearest to prototypes [n] in the bottleneck."""
    logits, _ = _assigned(assignment, features)
    directions = logits.prototypes.effective_weight()[chosen.to(logits.features.device)]
    cosines, places = nearest(directions, [logits.features], count)
    return cosines.cpu(), places.cpu()


def _assigned(assignment: Assignment, features: Tensor) -> tuple[PrototypeLogits, Tensor | None]:
    """Logits of features in evaluation mode, and the bias on their device."""
    head, bias = assignment.head, assignment.bias
    device = device_of(head)
    with evaluating(head):
        logits: PrototypeLogits = head(features.to(device, next(head.parameters()).dtype)).float()
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
