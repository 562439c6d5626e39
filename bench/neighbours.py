"""k-NN of many features: ours against the formula of DINO's published script in plain torch, on a CPU.

``python -m bench.neighbours [--full] [--rounds N] [--json FILE]``. Features of 384 numbers around a direction for each of
1,000 classes; ``--full`` has 50,000 training rows and 10,000 queries, the default a tenth of each. The published script takes
a hundredth of the queries at a time, all their cosines, the k largest, and a one-hot tensor of the neighbours' classes; it does
so again for every k. Both ways are timed for k = 200 alone and for k = 10, 20, 100 and 200. They take turns; medians. The
predictions are compared: they may differ where votes are equal to rounding, and the count of such queries is printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_bench.machine import machine
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_pretrain.evaluation.knn import voted
from vmf_pretrain.evaluation.nearest import nearest

FEATURES, CLASSES, TEMPERATURE = 384, 1000, 0.07
FULL, SMALL = (50_000, 10_000), (5_000, 1_000)
CHUNKS = 100  # of the published script
NOISE = 0.1  # of each number, beside a direction whose numbers have deviation 0.05
Split = tuple[Tensor, Tensor]
Way = Callable[[Split, Split, tuple[int, ...]], dict[int, Tensor]]


def split(rows: int, seed: int) -> Split:
    """[rows, FEATURES] unit features, and their classes."""
    centres = normalize(torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0)))
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=numbers)
    return normalize(centres[labels] + NOISE * torch.randn(rows, FEATURES, generator=numbers)), labels


def published(train: Split, test: Split, counts: tuple[int, ...]) -> dict[int, Tensor]:
    """The class with the most votes of every query, for each k."""
    found = {}
    for count in counts:
        predicted = []
        for rows in test[0].chunk(CHUNKS):
            cosines, places = (rows @ train[0].T).topk(count, largest=True, sorted=True)
            classes = train[1].expand(len(rows), -1).gather(1, places)
            one_hot = torch.zeros(classes.numel(), CLASSES).scatter_(1, classes.reshape(-1, 1), 1)
            votes = cosines.div(TEMPERATURE).exp_()
            tally = (one_hot.view(len(rows), -1, CLASSES) * votes.unsqueeze(2)).sum(1)
            predicted.append(tally.sort(1, descending=True).indices[:, 0])
        found[count] = torch.cat(predicted)
    return found


def ours(train: Split, test: Split, counts: tuple[int, ...]) -> dict[int, Tensor]:
    """The same."""
    cosines, places = nearest(test[0], [train[0]], max(counts))
    found = voted(cosines, train[1][places], test[1], counts=counts, temperature=TEMPERATURE)
    return {count: votes.predicted for count, votes in found.items()}


def timed(way: Way, train: Split, test: Split, counts: tuple[int, ...]) -> float:
    """Seconds."""
    began = time.perf_counter()
    way(train, test, counts)
    return time.perf_counter() - began


def measured(train: Split, test: Split, counts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Medians of both ways, and how many queries they predict differently."""
    first, other = ours(train, test, counts), published(train, test, counts)
    differing = max(int((first[count] != other[count]).sum()) for count in counts)
    seconds: dict[str, list[float]] = {way.__name__: [] for way in (ours, published)}
    for _ in range(rounds):
        for way in (ours, published):
            seconds[way.__name__].append(timed(way, train, test, counts))
    right = float((first[counts[0]] == test[1]).float().mean())
    row: dict[str, Any] = {name: statistics.median(times) for name, times in seconds.items()}
    row["mib"] = {
        way.__name__: cpu_peak_extra_mib(lambda way=way: way(train, test, counts), 0)  # type: ignore[misc]
        for way in (ours, published)
    }
    return {"k": list(counts), **row, "times": row["published"] / row["ours"], "differing": differing, "top_1": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    sizes = FULL if chosen.full else SMALL
    train, test = split(sizes[0], 1), split(sizes[1], 2)
    rows = [measured(train, test, counts, chosen.rounds) for counts in ((200,), (10, 20, 100, 200))]
    for row in rows:
        print(
            f"k {row['k']}: ours {row['ours']:.2f} s, published {row['published']:.2f} s, {row['times']:.1f}x; "
            f"at most {row['mib']['ours']:.0f} and {row['mib']['published']:.0f} MiB beside the features; "
            f"{row['differing']} of {sizes[1]} predictions differ; top-1 {100 * row['top_1']:.1f} %"
        )
    if chosen.json is not None:
        said = {"machine": machine(), "train": sizes[0], "queries": sizes[1], "threads": torch.get_num_threads()}
        chosen.json.write_text(json.dumps({**said, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
