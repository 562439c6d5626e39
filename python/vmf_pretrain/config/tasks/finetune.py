"""The task of fine-tuning."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive, require_share


@dataclass(frozen=True)
class Protocol:
    """How a network is fine-tuned.

    Attributes:
        epochs: over the training images.
        batch_size: images of a step.
        part: images of a forward pass, which are mixed among themselves; on a GPU of the source's.
        rate: learning rate of AdamW, of the last layer.
        rate_batch: the batch at which ``rate`` is what it says; None takes it for any batch.
        layer_decay: factor on the rate from each block to the one before it.
        schedule: "step": the rate rises from ``first_rate`` step by step, and falls to ``last_rate`` along a cosine; "epoch":
            the same epoch by epoch, the cosine beginning with the first one, and each at the rate of the one before.
        warmup_epochs: in which the rate rises.
        first_rate: at the start.
        last_rate: at the end.
        weight_decay: of matrices.
        drop_path: of the last block; it rises from 0 along the blocks.
        smoothing: of labels.
        mixup: parameter of the beta distribution of mixed images; 0 mixes none.
        cutmix: the same of pasted rectangles. With both, each part of a batch has one of them, with equal chances.
        augment: timm's name of a policy.
        erase: probability that a rectangle of an image is noise.
        head_scale: factor on the initial weights of the classifier.
        repeats: views of an image in an epoch, which then has as many images fewer.
        resize_by: interpolation of the test images.
    """

    epochs: int
    batch_size: int
    part: int
    rate: float
    rate_batch: int | None = None
    layer_decay: float = 1.0
    schedule: Literal["step", "epoch"] = "step"
    warmup_epochs: int = 20
    first_rate: float = 0.0
    last_rate: float = 1e-6
    weight_decay: float = 0.05
    drop_path: float = 0.1
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    head_scale: float = 0.001
    repeats: int = 1
    resize_by: Literal["bilinear", "bicubic"] = "bilinear"


_IMAGENET = Protocol(epochs=100, batch_size=1024, part=128, rate=4e-3, layer_decay=0.65)
_TRANSFER = Protocol(
    epochs=1000,
    batch_size=768,
    part=96,
    rate=7.5e-6,
    rate_batch=512,
    schedule="epoch",
    warmup_epochs=5,
    first_rate=1e-6,
    last_rate=1e-5,
    head_scale=1.0,
    repeats=3,
    resize_by="bicubic",
)
# Source: repository bytedance/ibot, run.sh and evaluation/README.md, on 8 GPUs. ImageNet: its classification_layer_decay, after
# BEiT, whose rate is the default; iBOT sweeps it. Other data: evaluation/eval_cls.py, after DeiT.
PROTOCOLS = {
    "imagenet_base": _IMAGENET,
    "imagenet_small": replace(_IMAGENET, epochs=200, layer_decay=0.75),
    "imagenet_large": replace(_IMAGENET, epochs=50, layer_decay=0.75, part=64, drop_path=0.2, warmup_epochs=5),
    "transfer": _TRANSFER,
    "cars": replace(_TRANSFER, rate=7.5e-5),
    "inaturalist": replace(_TRANSFER, epochs=360, erase=0.1),
}


@dataclass(frozen=True)
class FinetuneTask:
    """Fine-tuning of all weights, as iBOT has it. What is null is as the protocol has it.

    Attributes:
        protocol: "imagenet_small", "imagenet_base" or "imagenet_large" with rates that fall from block to block; "transfer" for
            CIFAR and Flowers, "cars", "inaturalist".
        rates: learning rates, of which the best is chosen on ``held_out`` of the training images; one or none chooses nothing.
        epochs: over the training images.
        batch_size: images of a step; at most all training images are taken.
        part: images of a forward pass.
        layer_decay: factor on the rate from each block to the one before it.
        warmup_epochs: in which the rate rises.
        drop_path: of the last block.
        smoothing: of labels.
        mixup: parameter of the distribution; 0 mixes no images.
        cutmix: the same of pasted rectangles.
        augment: timm's name of a policy.
        erase: probability that a rectangle of an image is noise.
        repeats: views of an image in an epoch.
        held_out: share of each class on which the rate is chosen.
        workers: processes that decode images; 0 decodes in this one.
    """

    protocol: Literal["imagenet_small", "imagenet_base", "imagenet_large", "transfer", "cars", "inaturalist"] = (
        "imagenet_base"
    )
    rates: tuple[float, ...] = ()
    epochs: int | None = None
    batch_size: int | None = None
    part: int | None = None
    layer_decay: float | None = None
    warmup_epochs: int | None = None
    drop_path: float | None = None
    smoothing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    augment: str | None = None
    erase: float | None = None
    repeats: int | None = None
    held_out: float = 0.1
    workers: int = 4

    def __post_init__(self) -> None:
        chosen = self.chosen()
        require(
            min(self.rates, default=1) > 0 and len(set(self.rates)) == len(self.rates),
            f"finetune.rates is {list(self.rates)}; expected different numbers greater than 0.",
        )
        names = ("epochs", "batch_size", "part", "layer_decay", "repeats")
        require_positive("finetune", **{name: getattr(chosen, name) for name in names})
        require(
            min(chosen.part, chosen.batch_size) > 1,
            f"finetune.part is {chosen.part} and finetune.batch_size {chosen.batch_size}; expected at least 2, to mix images.",
        )
        require_not_negative(
            "finetune",
            warmup_epochs=chosen.warmup_epochs,
            mixup=chosen.mixup,
            cutmix=chosen.cutmix,
            workers=self.workers,
        )
        require_share("finetune", smoothing=chosen.smoothing, erase=chosen.erase, layer_decay=chosen.layer_decay)
        require(
            0 <= chosen.drop_path < 1, f"finetune.drop_path is {chosen.drop_path} but must be at least 0 and below 1."
        )
        require(0 < self.held_out < 1, f"finetune.held_out is {self.held_out} but must lie strictly between 0 and 1.")

    def chosen(self) -> Protocol:
        """The protocol with what the settings change; its rate is the first of ``rates``, if there are any."""
        given = {one.name: getattr(self, one.name, None) for one in fields(Protocol)}
        changed = {name: value for name, value in given.items() if value is not None}
        if self.rates:
            changed["rate"] = self.rates[0]
        return replace(PROTOCOLS[self.protocol], **changed)
