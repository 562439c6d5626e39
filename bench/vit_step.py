"""A whole training step of a ViT-S/16 under DINO, with the published head and loss and with ours: what ours saves there.

python -m bench.vit_step --images 4 --json bench/results/cpu/vit_step.json

Every variant trains networks of the same weights on the same crops: both backbones forward, both heads and the loss, backward,
AdamW, the teacher's moving average. Steps of the variants alternate. Backward stops at the features and goes on from there, so
that the time of the heads and the loss is seen by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOHead, PublishedDINOLoss
from vmf_bench.machine import machine
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_bench.published import TEACHER_CROPS
from vmf_kernels import DINOHead, DINOLoss
from vmf_pretrain import with_torchvision  # noqa: F401 -- before timm, which imports torchvision

SCHEDULE = (0.04, 0.04, 0, 1)  # teacher temperature 0.04 throughout
EMA, LEARNING_RATE, WEIGHT_DECAY = 0.996, 5e-4, 0.04
WARM_UP = 1
PHASES = ("backbone", "head and loss", "update")


@dataclass(frozen=True)
class Setting:
    """Sizes of a step: DINO's crops of 224 and 96 pixels, unless smaller ones are asked for."""

    images: int = 4
    global_size: int = 224
    local_size: int = 96
    local_crops: int = 8
    prototypes: int = 65_536
    backbone: str = "vit_small_patch16_224"

    @property
    def crops(self) -> int:
        """Crops that the student sees."""
        return TEACHER_CROPS + self.local_crops


TOY = Setting(1, 32, 16, 1, 64, "vit_tiny_patch16_224")


def published(setting: Setting, dim: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Heads of student and teacher, and the loss, as published."""
    heads = [PublishedDINOHead(dim, setting.prototypes) for _ in range(2)]
    return heads[0], heads[1], PublishedDINOLoss(setting.prototypes, setting.crops, *SCHEDULE)


def compiled(setting: Setting, dim: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same, the loss under torch.compile."""
    student, teacher, loss = published(setting, dim)
    return student, teacher, torch.compile(loss)  # type: ignore[return-value]


def ours(setting: Setting, dim: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The two lines swapped."""
    heads = [DINOHead(dim, setting.prototypes) for _ in range(2)]
    return heads[0], heads[1], DINOLoss(setting.prototypes, setting.crops, *SCHEDULE)


VARIANTS: dict[str, Callable[[Setting, int], tuple[nn.Module, nn.Module, nn.Module]]] = {
    "published loss": published,
    "published loss, compiled": compiled,
    "ours": ours,
}


@dataclass
class Training:
    """Student and teacher with one variant of head and loss, and what a step takes of time."""

    setting: Setting
    variant: str
    seconds: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import timm  # after vmf_pretrain, which declares what torchvision lacks on a CPU build of torch

        torch.manual_seed(0)
        backbones = [timm.create_model(self.setting.backbone, num_classes=0, dynamic_img_size=True) for _ in range(2)]
        width = backbones[0].num_features
        assert isinstance(width, int)
        student_head, teacher_head, self.loss = VARIANTS[self.variant](self.setting, width)
        self.student = nn.ModuleDict({"backbone": backbones[0], "head": student_head})
        self.teacher = nn.ModuleDict({"backbone": backbones[1], "head": teacher_head}).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        generator = torch.Generator().manual_seed(1)
        sizes = [self.setting.global_size] * TEACHER_CROPS + [self.setting.local_size] * self.setting.local_crops
        self.views = [torch.randn(self.setting.images, 3, size, size, generator=generator) for size in sizes]

    def features(self, network: nn.ModuleDict, views: list[Tensor]) -> Tensor:
        """[V * B, D] of views of two sizes, a pass of the backbone for each size."""
        by_size: dict[int, list[Tensor]] = {}
        for view in views:
            by_size.setdefault(view.shape[-1], []).append(view)
        return torch.cat([network["backbone"](torch.cat(same)) for same in by_size.values()])

    def step(self) -> float:
        """One step; returns its loss and notes its times."""
        marks = [time.perf_counter()]
        student = self.features(self.student, self.views)
        with torch.no_grad():
            teacher = self.features(self.teacher, self.views[:TEACHER_CROPS])
        marks.append(time.perf_counter())
        cut = student.detach().requires_grad_()
        with torch.no_grad():
            targets = self.teacher["head"](teacher)
        loss = self.loss(self.student["head"](cut), targets, 0)
        loss.backward()
        marks.append(time.perf_counter())
        student.backward(cut.grad)
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for ema, current in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ema.lerp_(current, 1 - EMA)
        marks.append(time.perf_counter())
        forward, head, backward, update = (after - before for before, after in itertools.pairwise(marks))
        self.seconds.append(dict(zip(PHASES, (forward + backward, head, update), strict=True)))
        return float(loss.detach())

    def row(self, losses: list[float]) -> dict[str, Any]:
        """Medians over the steps that count."""
        counted = self.seconds[WARM_UP : WARM_UP + len(losses)]
        phases = {phase: statistics.median(step[phase] for step in counted) for phase in PHASES}
        total = statistics.median(sum(step.values()) for step in counted)
        return {
            "variant": self.variant,
            "seconds": total,
            "all_seconds": [round(sum(step.values()), 4) for step in counted],
            "phases": phases,
            "images_per_second": self.setting.images / total,
            "head_share": phases["head and loss"] / total,
            "losses": losses,
            "peak_mib": cpu_peak_extra_mib(self.step, 0),
        }


def measure(setting: Setting, rounds: int, variants: Iterable[str] = tuple(VARIANTS)) -> Iterator[dict[str, Any]]:
    """A row for each variant; their steps alternate."""
    trainings = [Training(setting, variant) for variant in variants]
    losses: list[list[float]] = [[] for _ in trainings]
    for index in range(WARM_UP + rounds):
        for training, values in zip(trainings, losses, strict=True):
            loss = training.step()
            if index >= WARM_UP:
                values.append(loss)
    for training, values in zip(trainings, losses, strict=True):
        yield training.row(values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=Setting.images, help="a batch")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each variant that count")
    parser.add_argument("--toy", action="store_true", help="a size for tests")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.images < 1 or options.rounds < 1:
        parser.error("--images and --rounds are at least 1")
    setting = TOY if options.toy else Setting(options.images)
    rows = list(measure(setting, options.rounds))
    if options.json:
        report = {"machine": machine(), "setting": vars(setting), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(f"{row['variant']:26} {row['images_per_second']:.2f} images/s, head {100 * row['head_share']:.0f} %")


if __name__ == "__main__":
    main()
