"""One small loss and its gradients, for compute-sanitizer to watch: python -m bench.gpu.sanitizer_case cuda triton 64."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from vmf_bench.agreement import outcome_of
from vmf_bench.inputs import HeadInputs, HeadShape
from vmf_bench.ours import ours

SHAPE = HeadShape(16, 2, 6, prototypes=1000, dim=64)  # 96/32 rows; no size is a multiple of a tile but D


def run(device: str, backend: str, dim: int = SHAPE.dim) -> float:
    """The loss, once its gradients are known to be finite."""
    outcome = outcome_of(ours(backend), HeadInputs.of(replace(SHAPE, dim=dim), device=torch.device(device)))
    for name, value in outcome.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return outcome["loss"].item()


if __name__ == "__main__":
    print(f"loss {run(sys.argv[1], sys.argv[2], int(sys.argv[3])):.4f}")
