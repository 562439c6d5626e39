"""A few steps of the run that is meant, in memory only: how fast, how large, and how long all of it would take."""

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.loader import load_from, require_open_files, require_shared_memory
from vmf_pretrain.data.waiting import Waiting
from vmf_pretrain.doctor.memory import USABLE, PeakMemory, Sized, at_hand, fitting
from vmf_pretrain.engine.beginning import beginning
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.parallel import choose_device
from vmf_pretrain.engine.votes import Taken
from vmf_pretrain.methods.table import method_class

STEPS = 20
LEAST_STEPS = 10  # of the largest size, if the time is short
WARM = 2  # steps before time counts: workers start, and kernels are compiled
SMALLEST = 2  # images: KoLeo compares two


@dataclass(frozen=True)
class DryRun:
    """What was measured.

    Attributes:
        steps: that time counts of.
        images: of such a step, the larger of the two sizes by which memory is judged.
        fewer: images of the smaller one; the same where there is only one size.
        part: images that the run computes at once: its batch over ``train.accumulate``.
        images_per_second: at that size.
        data_wait: share of the time spent waiting for data.
        memory: peak of the larger of two sizes, bytes.
        fits: images at once that fit into the memory at hand; None if memory grew too little to tell.
        at_hand: bytes.
        checkpoint: bytes of one.
        weights: bytes of the exported network.
        not_finite: steps whose loss or gradient was not finite.
        run_images: images that all epochs see.
    """

    steps: int
    images: int
    fewer: int
    part: int
    images_per_second: float
    data_wait: float
    memory: int
    fits: int | None
    at_hand: int
    checkpoint: int
    weights: int
    not_finite: int
    run_images: int

    @property
    def hours(self) -> float:
        """Of all epochs at this speed, without evaluations."""
        return self.run_images / self.images_per_second / 3600


def rehearsed(config: Config) -> Config:
    """The run without what would leave something behind or take minutes first: no cache, no compilation, no download."""
    begin = config.start_from if config.start_from.hub_name is None else type(config.start_from)()
    train = replace(config.train, compile=False, accumulate=1)
    return replace(config, data=replace(config.data, cache=None), train=train, start_from=begin)


def dry_run(config: Config, seconds: float, say: Callable[[str], None], *, allow_code: bool = False) -> DryRun:
    """Steps of growing size, and then up to 20 of the largest for which the time allows half as many.

    Args:
        config: the run that is meant.
        seconds: that these steps may take.
        say: gets what is said of weights that the run starts from.
        allow_code: whether the settings may name modules to import.

    Raises:
        PretrainError: whatever would end the run at its start.
    """
    loop, batches_of = _prepared(rehearsed(config), say, allow_code=allow_code)
    trial, whole = Trial(loop), batches_of(config.data.batch_size)
    part = max(config.data.batch_size // config.train.accumulate, min(SMALLEST, config.data.batch_size))
    sizes = trial.growing(batches_of, part, seconds)
    steps, speed, wait = trial.steps(batches_of(sizes[-1].images), seconds)
    memory = at_hand(loop.device)
    return DryRun(
        steps=steps,
        images=sizes[-1].images,
        fewer=sizes[-2:][0].images,
        part=part,
        images_per_second=speed,
        data_wait=wait,
        memory=sizes[-1].bytes,
        fits=fitting(sizes[-2], sizes[-1], memory) if len(sizes) > 1 else None,
        at_hand=memory,
        checkpoint=sum(_bytes(group) for group in loop.tensors().values()),
        weights=_bytes(loop.method.exported.state_dict()),
        not_finite=trial.not_finite,
        run_images=len(whole) * config.data.batch_size,
    )


def _prepared(
    config: Config, say: Callable[[str], None], *, allow_code: bool
) -> tuple[Loop, Callable[[int], ViewBatches]]:
    """The run's state before its first step, and its batches at any number of images."""
    method = method_class(config, allow_code=allow_code)
    train = load_images(config, allow_code=allow_code)[0]
    plan = method.plan(config)
    whole = ViewBatches(train, config, plan)
    if config.data.workers:
        require_shared_memory(whole)
        require_open_files(whole)
    device = choose_device(config.train.device)
    loop = Loop(config, method, whole.steps_per_epoch, device, begin=beginning(config, say))
    return loop, lambda images: ViewBatches(train, replace(config, data=replace(config.data, batch_size=images)), plan)


class Trial:
    """A loop whose steps are timed.

    Args:
        loop: the method and its optimizer.
        clock: seconds that only rise.

    Attributes:
        not_finite: steps so far whose loss or gradient was not finite.
    """

    def __init__(self, loop: Loop, clock: Callable[[], float] = time.perf_counter) -> None:
        self.loop, self.clock = loop, clock
        self.not_finite, self._step = 0, 0

    def growing(self, batches_of: Callable[[int], ViewBatches], most: int, seconds: float) -> list[Sized]:
        """Steps of 2, 4, 8, ... images up to ``most``, as long as LEAST_STEPS of the next size fit into ``seconds``."""
        peak, sizes, images = PeakMemory(self.loop.device), list[Sized](), min(SMALLEST, most)
        while True:
            batches = batches_of(images)
            if not sizes:
                self._take(batches.batch(0))  # the first one of all does what later ones need not
            peak.reset()
            batch, begun = batches.batch(0), self.clock()
            self._take(batch)
            sizes.append(Sized(images, self.clock() - begun, peak.read()))
            following = min(2 * images, most)
            if images == most or (len(sizes) > 1 and not self._goes_further(sizes[-2:], following, seconds)):
                return sizes
            images = following

    def _goes_further(self, last: list[Sized], images: int, seconds: float) -> bool:
        """Whether there are time and memory for steps of so many images, by the line through the last two sizes."""
        smaller, larger = last
        more = (images - larger.images) / (larger.images - smaller.images)
        longer, larger_by = larger.seconds - smaller.seconds, larger.bytes - smaller.bytes
        lasts = larger.seconds + more * max(longer, 0.0)
        takes = larger.bytes + more * max(larger_by, 0)
        return LEAST_STEPS * lasts <= seconds and takes <= USABLE * at_hand(self.loop.device)

    def steps(self, batches: ViewBatches, seconds: float) -> tuple[int, float, float]:
        """Steps that count, images a second, and the share of waiting for data, with the run's own workers."""
        warm, started, counted = min(WARM, len(batches) - 1), self.clock(), 0
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "This DataLoader will create"
            )  # more workers than cores: a finding of ours
            loading = load_from(batches, 0)
        waiting = Waiting(loading, self.clock)
        with contextlib.closing(loading):
            begun = self.clock()
            for number, batch in zip(range(STEPS), waiting, strict=False):
                self._take(batch)
                counted = number + 1 - warm
                if counted == 0:
                    waiting.restart()
                    begun = self.clock()
                if counted > 0 and self.clock() - started > seconds:
                    break
            share, passed = waiting.share, self.clock() - begun
        self._learn(self.loop.drain())
        return counted, counted * batches.rows / max(passed, 1e-9), share

    def _take(self, batch: Batch) -> None:
        self._learn(self.loop.step(self._step, batch))
        self._step += 1
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize(self.loop.device)

    def _learn(self, taken: list[Taken]) -> None:
        self.not_finite += sum(one.counts.not_finite > 0 for one in taken)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
