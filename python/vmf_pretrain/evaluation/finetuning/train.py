"""All weights of a network trained on labelled images.

Legend: N training images, B of a part, M test images, C classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.finetune import Protocol
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.data.randomness import TRAINING_STEP, stream_seed
from vmf_pretrain.evaluation.finetuning.network import Classifier, classifier_of, rate_groups
from vmf_pretrain.evaluation.finetuning.schedule import rate_of
from vmf_pretrain.evaluation.finetuning.state import Kept
from vmf_pretrain.evaluation.finetuning.views import (
    SEED,
    Course,
    Place,
    Views,
    drawing_from,
    parts_of,
    start_stream,
)
from vmf_pretrain.evaluation.outputs import precision
from vmf_pretrain.evaluation.views import View


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images to train on.

    Attributes:
        images: N readable ones.
        labels: [N] int64 in [0, classes), on the CPU.
        classes: C.
    """

    images: Images
    labels: Tensor
    classes: int


@dataclass(frozen=True, eq=False)
class Machine:
    """Where and how it is computed.

    Attributes:
        dtype: of forward passes, by autocast.
        workers: processes that decode images.
        kept: what is on disk of this training.
    """

    dtype: torch.dtype
    workers: int
    kept: Kept


def fine_tuned(
    network: nn.Module, features: int, fed: NetworkInput, given: Labelled, protocol: Protocol, machine: Machine
) -> Classifier:
    """The network after the last epoch, in evaluation mode; deterministic on a CPU, and the given network stays as it is.

    It goes on after the epoch that is kept, to the weights that it would have had without the interruption. A batch holds at
    most all images, and an odd one fewer, as images are mixed in pairs; what is left of an epoch is dropped.

    Raises:
        PretrainError: there are fewer than 2 images, the network cannot be fine-tuned, the loss is not finite, or the disk is
            full.
    """
    count = len(given.images)
    size = min(protocol.batch_size, count) // 2 * 2
    if size < 2:
        raise PretrainError(f"{count} training image is too few for fine-tuning; expected at least 2.")
    device = next(network.parameters()).device
    with drawing_from(SEED, device):
        classifier = classifier_of(network, features, given.classes, protocol).train()
        optimizer = torch.optim.AdamW(rate_groups(classifier, protocol), lr=0.0)
        course = Course(count, size, protocol, machine.kept.restore(classifier, optimizer))
        soften = _mixing(protocol, given.classes) or protocol.smoothing
        inputs = parts_of(Views(given.images, fed, protocol), course, machine.workers)
        for step, batch in enumerate(course.batches(), course.done * course.steps_per_epoch):
            start_stream(stream_seed(SEED, TRAINING_STEP, step))
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate_of(protocol, size, step, course.steps_per_epoch)
            drawn = ((next(inputs), _labels(given, part)) for part in batch)
            _step(classifier, optimizer, drawn, size, soften, machine.dtype)
            if not (step + 1) % course.steps_per_epoch:
                machine.kept.epoch_ended((step + 1) // course.steps_per_epoch, classifier, optimizer)
    return classifier.eval()


def _labels(given: Labelled, part: Sequence[Place]) -> Tensor:
    return given.labels[[place for _, place in part]]


def _mixing(protocol: Protocol, classes: int) -> Mixup | None:
    if not protocol.mixup and not protocol.cutmix:
        return None
    return Mixup(
        mixup_alpha=protocol.mixup,
        cutmix_alpha=protocol.cutmix,
        label_smoothing=protocol.smoothing,
        num_classes=classes,
    )


def _step(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    parts: Iterable[tuple[Tensor, Tensor]],
    size: int,
    soften: Mixup | float,
    dtype: torch.dtype,
) -> None:
    """One step on a batch of ``size`` in parts, each [B, C, S, S] with [B] labels, which are mixed, or smoothed by a number."""
    device = classifier.head.weight.device
    optimizer.zero_grad(set_to_none=True)
    for inputs, labels in parts:
        shown, wanted = inputs.to(device), labels.to(device)
        smoothing = 0.0  # of targets that are smooth already
        if isinstance(soften, Mixup):
            shown, wanted = soften(shown, wanted)
        else:
            smoothing = soften
        with precision(device, dtype):
            logits = classifier(shown)
        loss = functional.cross_entropy(logits.float(), wanted, label_smoothing=smoothing)
        if not bool(loss.isfinite()):
            raise PretrainError("the loss of fine-tuning is NaN or infinite; lower finetune.rates.")
        (loss * len(labels) / size).backward()
    optimizer.step()


@torch.no_grad()
def logits_of(
    classifier: Classifier, fed: NetworkInput, images: Images, view: View, part: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """[B, C] logits of readable images, some at a time, as the view shows them; all views have one size."""
    device = classifier.head.weight.device
    for start in range(0, len(images), part):
        places = range(start, min(len(images), start + part))
        pixels = torch.stack([images.viewed(place, view) for place in places])
        with precision(device, dtype):
            yield classifier(fed.of(pixels.to(device))).float()
