"""Train with DINO's loss as it is usually written, and with this library's: the same losses, without the [rows, K] logits.

python examples/swap_the_loss.py --steps 20 --prototypes 16384

The backbone is a small network on random images, so that nothing but torch is needed. The two runs start from the same weights
and see the same crops. What changes between them are the two lines of ``head_and_loss``.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_kernels.compat.dino import DINOHead, DINOLoss

CROPS, GLOBAL_CROPS, IMAGES, WIDTH = 6, 2, 8, 128


class UsualHead(nn.Module):
    """The published head: an MLP, normalisation, and a weight-normed last layer, whose logits are stored."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        ours = DINOHead(WIDTH, prototypes)
        self.mlp, self.last_layer = ours.mlp, ours.last_layer

    def forward(self, features: Tensor) -> Tensor:
        """[rows, K] logits of [rows, WIDTH] features."""
        bottleneck = functional.normalize(self.mlp(features), dim=1)
        return bottleneck @ functional.normalize(self.last_layer.weight_v, dim=1).T


class UsualLoss(nn.Module):
    """DINO's loss as its paper states it (Caron et al., 2021, algorithm 1): cross-entropy over pairs of different crops."""

    center: Tensor

    def __init__(self, prototypes: int, teacher_temp: float) -> None:
        super().__init__()
        self.teacher_temp = teacher_temp
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """[] mean over all pairs; moves the center."""
        targets = ((teacher - self.center) / self.teacher_temp).softmax(1).chunk(GLOBAL_CROPS)
        logs = (student / 0.1).log_softmax(1).chunk(CROPS)
        pairs = [-(t * s).sum(1).mean() for i, t in enumerate(targets) for j, s in enumerate(logs) if i != j]
        self.center.lerp_(teacher.mean(0, keepdim=True), 0.1)
        return torch.stack(pairs).mean()


def head_and_loss(kind: str, prototypes: int) -> tuple[nn.Module, nn.Module]:
    """The two lines to swap."""
    if kind == "usual":
        return UsualHead(prototypes), UsualLoss(prototypes, teacher_temp=0.04)
    return DINOHead(WIDTH, prototypes), DINOLoss(prototypes, CROPS, 0.04, 0.04, 0, 100)


def train(kind: str, steps: int, prototypes: int) -> tuple[list[float], float]:
    """Losses of all steps, and the milliseconds of the fastest step."""
    torch.manual_seed(0)
    head, criterion = head_and_loss(kind, prototypes)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), head)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    images = torch.Generator().manual_seed(1)
    losses, fastest = [], float("inf")
    for _ in range(steps):
        crops = torch.randn(CROPS * IMAGES, 3, 16, 16, generator=images)
        began = time.perf_counter()
        loss = criterion(student(crops), teacher(crops[: GLOBAL_CROPS * IMAGES]), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(new, 0.004)
        fastest = min(fastest, time.perf_counter() - began)
        losses.append(loss.item())
    return losses, 1e3 * fastest


def main() -> None:
    """Train both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prototypes", type=int, default=16384)
    asked = parser.parse_args()
    usual, usual_ms = train("usual", asked.steps, asked.prototypes)
    ours, ours_ms = train("ours", asked.steps, asked.prototypes)
    for step in {0, asked.steps // 2, asked.steps - 1}:
        print(f"step {step}: {usual[step]:.6f} as usual, {ours[step]:.6f} with vmf_kernels")
    worst = max(abs(a - b) / abs(a) for a, b in zip(usual, ours, strict=True))
    print(f"largest relative difference of the loss over {asked.steps} steps: {worst:.1e}")
    print(f"fastest step: {usual_ms:.1f} ms as usual, {ours_ms:.1f} ms with vmf_kernels")
    if not worst < 1e-3:
        raise SystemExit("the two losses differ")


if __name__ == "__main__":
    main()
