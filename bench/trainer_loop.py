"""What the trainer's loop costs beside the networks, and what a second rank gains, on a CPU.

python -m bench.trainer_loop --json bench/results/cpu/trainer_loop.json

A step is a ViT-S/16's under DINO-vMF at batch 16, two views of 224 and eight of 96 pixels, 65,536 prototypes. The views are
made beforehand: what the loader costs is in bench/views.py. "The rest" is everything in a step but the forward pass, the
backward pass, and the update (clipping, AdamW, the teacher). The gain of a second rank is measured on a smaller network, each
rank on a core of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import start_processes

from vmf_bench.machine import machine
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_pretrain.config.data import DataConfig
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.engine import loop as loop_module
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.optim import clip_groups
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks

WARM_UP = 1
PARTS = ("forward", "backward", "update")


def config_of(images: int, *, small: bool) -> Config:
    """DINO-vMF's step: as published, or with a network of width 192 on smaller views."""
    base = Config(data=DataConfig(kind="folder", folder="."))
    sizes: dict[str, Any] = {"global_size": 64, "local_size": 32, "local_count": 4} if small else {}
    return replace(
        base,
        data=replace(base.data, batch_size=images),
        views=replace(base.views, **sizes),
        backbone=replace(base.backbone, name="vit_tiny_patch16_224" if small else base.backbone.name),
        head=replace(base.head, prototypes=4096 if small else base.head.prototypes),
        loss=replace(base.loss, koleo_weight=0.1),
        train=replace(base.train, device="cpu"),
    )


def batch_for(config: Config) -> Batch:
    """This rank's share of a batch of noise."""
    images = config.data.batch_size // ranks.count()
    sides = [config.views.global_size] * 2 + [config.views.local_size] * config.views.local_count
    numbers = torch.Generator().manual_seed(ranks.rank())
    return Batch([torch.randn(images, 3, side, side, generator=numbers) for side in sides], indices=list(range(images)))


def build(config: Config) -> Loop:
    """A loop of 100 steps an epoch."""
    return Loop(config, method_class(config), 100, torch.device("cpu"))


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added to a part."""

        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return run


def clocked(loop: Loop) -> Clock:
    """Measure the parts of a loop's steps."""
    clock = Clock()
    wrapped: Any = loop.wrapped
    forward, wrapped.backward = wrapped.module, clock.timed("backward", wrapped.backward)
    wrapped.module = clock.timed("forward", forward)
    loop.optimizer.step = clock.timed("update", loop.optimizer.step)  # type: ignore[method-assign]
    loop.method.after_step = clock.timed("update", loop.method.after_step)  # type: ignore[method-assign]
    loop_module.clip_groups = clock.timed("update", clip_groups)  # type: ignore[attr-defined]
    return clock


def overhead(config: Config, steps: int) -> dict[str, Any]:
    """Seconds a step, by part; medians over the steps."""
    loop, batch = build(config), batch_for(config)
    clock = clocked(loop)
    rows = []
    for step in range(WARM_UP + steps):
        clock.seconds.clear()
        began = time.perf_counter()
        loop.step(step, batch, log=True)
        whole = time.perf_counter() - began
        rows.append({**clock.seconds, "the rest": whole - sum(clock.seconds.values()), "whole": whole})
    medians = {part: statistics.median(row[part] for row in rows[WARM_UP:]) for part in (*PARTS, "the rest", "whole")}
    peak = cpu_peak_extra_mib(lambda: loop.step(WARM_UP + steps, batch, log=True), 0)
    images = config.data.batch_size
    return {
        "images": images,
        "seconds": medians,
        "share": medians["the rest"] / medians["whole"],
        "peak_extra_mib": peak,
    }


def rate(config: Config, steps: int) -> float:
    """Images a second over all ranks."""
    loop, batch = build(config), batch_for(config)
    loop.step(0, batch)
    seconds = []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        loop.step(step, batch)
        seconds.append(time.perf_counter() - began)
    return config.data.batch_size / statistics.median(seconds)


def _rank(rank: int, folder: str, count: int, images: int, steps: int) -> None:
    torch.set_num_threads(1)
    if count > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    found = rate(config_of(images, small=True), steps)
    if rank == 0:
        Path(folder, "rate.json").write_text(json.dumps(found))
    if count > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def rates(counts: tuple[int, ...], images: int, steps: int, rounds: int) -> dict[int, list[float]]:
    """Images a second by number of ranks, a thread each; rounds are interleaved."""
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                start_processes(_rank, (folder, count, images, steps), nprocs=count, start_method="spawn")
                found[count].append(json.loads(Path(folder, "rate.json").read_text()))
    return found


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    ranked = rates((1, 2), 64, 10, chosen.rounds)
    result = {
        "machine": machine(),
        "step": overhead(config_of(chosen.images, small=False), chosen.steps),
        "ranks": {str(count): values for count, values in ranked.items()},
        "gain": statistics.median(ranked[2]) / statistics.median(ranked[1]),
    }
    print(json.dumps(result, indent=1))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
