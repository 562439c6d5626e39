"""Processor milliseconds and memory of following objects from frame to frame: ours, and the published formula in plain torch.

``python -m bench.video_propagation [--patch 16|8] [--objects N] [--repeats N] [--json PATH]``. A frame of 480 x 832 pixels has
30 x 52 patches of 16, or 60 x 104 of 8, for which the published formula needs about 2.5 GiB; 8 source frames, 384 features.

- ours: ``Propagation.labels``, blocks of rows, the largest cosines before any exponential;
- published: every affinity, its exponential, the mask of the neighbourhood, the largest five over all source patches. The mask
  is formed before, as it is once a video.

Ways take turns, and processor time is counted, that of all threads together, so that other work on the machine matters little.
Medians. Memory is the largest sum of what torch has allocated during a frame.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vmf_bench.machine import machine
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_pretrain.evaluation.video.propagate import Propagation
from vmf_pretrain.evaluation.video.protocols import DINO
from vmf_pretrain.evaluation.video.reach import Reach

FRAMES, FEATURES = 8, 384
GRIDS = {16: (30, 52), 8: (60, 104)}  # patches of 480 x 832 pixels
Way = Callable[[Tensor, Tensor, Tensor, Propagation], Tensor]


def ours(target: Tensor, sources: Tensor, labels: Tensor, settings: Propagation) -> Tensor:
    return settings.labels(target, sources, labels)


def published(
    target: Tensor, sources: Tensor, labels: Tensor, settings: Propagation, near: Tensor | None = None
) -> Tensor:
    """The formula of facebookresearch/dino's video evaluation: [H, W, C] labels from all affinities at once.

    ``near`` is the ``neighbourhood``, which the published code forms once a video and not once a frame.
    """
    frames, height, width, _ = sources.shape
    near = neighbourhood(height, width, settings.reach) if near is None else near
    affinity = torch.bmm(target.flatten(0, 1).expand(frames, -1, -1), sources.flatten(1, 2).transpose(1, 2))
    affinity = affinity.div(settings.temperature).exp_().mul_(near)
    affinity = affinity.transpose(1, 2).reshape(-1, height * width)  # [source patches, target patches]
    smallest = affinity.topk(settings.neighbours, dim=0).values.amin(dim=0)
    affinity[affinity < smallest] = 0
    affinity = affinity / affinity.sum(dim=0, keepdim=True)
    return (labels.flatten(0, 2).T @ affinity).T.reshape(height, width, -1)


def neighbourhood(height: int, width: int, reach: Reach) -> Tensor:
    """[H W, H W] 1 where a patch is within reach, 0 elsewhere."""
    rows, columns = slice(0, height), slice(0, width)
    return reach.within(rows, columns, rows, columns).flatten(1).float()


def ways_of(height: int, width: int) -> dict[str, Way]:
    """What takes turns, on frames of so many patches; what a video needs once is there before."""
    return {"ours": ours, "published": partial(published, near=neighbourhood(height, width, DINO.propagation.reach))}


def frames_of(height: int, width: int, objects: int, frames: int = FRAMES) -> tuple[Tensor, Tensor, Tensor]:
    """A scene that drifts: features of a frame and of earlier ones, of length 1, and soft labels of these."""
    generator = torch.Generator().manual_seed(0)
    scene = functional.interpolate(
        torch.randn(1, FEATURES, 1 + height // 3, 1 + width // 3, generator=generator), (height, width)
    )[0]
    noisy = [scene.roll(time, 2) + 0.5 * torch.randn(scene.shape, generator=generator) for time in range(frames + 1)]
    features = functional.normalize(torch.stack(noisy).permute(0, 2, 3, 1), dim=-1).contiguous()
    labels = torch.randn(frames, height, width, objects + 1, generator=generator).mul(3).softmax(dim=-1)
    return features[-1], features[:-1], labels


def milliseconds(ways: dict[str, Way], inputs: tuple[Tensor, Tensor, Tensor], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):  # the first one only warms up
        for name, way in ways.items():
            begun = time.process_time()
            way(*inputs, DINO.propagation)
            if repeat >= 0:
                taken[name].append(1e3 * (time.process_time() - begun))
    return {name: float(np.median(numbers)) for name, numbers in taken.items()}


def extra_mib(ways: dict[str, Way], inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    return {name: cpu_peak_extra_mib(partial(way, *inputs, DINO.propagation), 0) for name, way in ways.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, choices=GRIDS, default=16)
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    height, width = GRIDS[given.patch]
    inputs = frames_of(height, width, given.objects)
    ways = ways_of(height, width)
    found = [way(*inputs, DINO.propagation) for way in ways.values()]
    difference = float((found[0] - found[1]).abs().max())
    taken, memory = milliseconds(ways, inputs, given.repeats), extra_mib(ways, inputs)
    record: dict[str, Any] = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "patches": [height, width],
        "largest_difference": difference,
        "milliseconds": taken,
        "extra_mib": memory,
    }
    print(
        f"{record['machine']['cpu']}, {record['threads']} threads: {height} x {width} patches, at most {difference:.1e} apart"
    )
    for name in ways:
        print(f"{name:10} {taken[name]:9.1f} ms {memory[name]:7.0f} MiB")
    print(f"{taken['published'] / taken['ours']:.2f}x")
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
