"""The learning rate of each step of fine-tuning."""

import math

from vmf_pretrain.config.tasks.finetune import Protocol


def rate_of(protocol: Protocol, batch_size: int, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, before each layer's share.

    Args:
        protocol: the schedule.
        batch_size: images of a step.
        step: from 0.
        steps_per_epoch: at least 1.

    Source: repository bytedance/ibot. "step" is the ``cosine_scheduler`` of evaluation/classification_layer_decay; "epoch" is
    timm's ``CosineLRScheduler`` as evaluation/eval_cls.py calls it, after each epoch with the number of that epoch.
    """
    rate = protocol.rate if protocol.rate_batch is None else protocol.rate * batch_size / protocol.rate_batch
    if protocol.schedule == "epoch":
        time, warmup, whole = max(0, step // steps_per_epoch - 1), protocol.warmup_epochs, protocol.epochs
        if time < warmup:
            return protocol.first_rate + time * (rate - protocol.first_rate) / warmup
        return _cosine(rate, protocol.last_rate, time / whole)
    warmup = min(protocol.warmup_epochs, protocol.epochs) * steps_per_epoch
    if step < warmup:
        return protocol.first_rate + (rate - protocol.first_rate) * step / max(1, warmup - 1)
    return _cosine(rate, protocol.last_rate, (step - warmup) / (protocol.epochs * steps_per_epoch - warmup))


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
