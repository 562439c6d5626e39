"""One workload: every variant is prepared and checked, then all are timed together, then this library's are profiled."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from bench.gpu import probes
from bench.gpu.agreement import exact_outcome, refuse_disagreement
from bench.gpu.environment import clocks
from bench.gpu.hang import limited
from bench.gpu.losses import ALL, BESIDE, OURS, SAME_KERNELS, Variant, Wanted, variants
from bench.gpu.record import Record, Under, attempt
from bench.gpu.settings import Settings
from vmf_bench.agreement import Outcome, outcome_of, relative_errors
from vmf_bench.inputs import HeadInputs, HeadShape
from vmf_bench.memory import peak_extra_mib
from vmf_bench.peers.peer import Loss
from vmf_bench.timing import Measure, Step, Stopwatch, interleaved, rounds_within, training_step

PREPARE_SECONDS = 40  # most for one variant: mostly its compilation
COMPILE_MEMORY_SHARE = 0.12  # of the device, for each process that only compiles: 9.6 GB of 80
LEAST_ROUNDS, DRY_ROUNDS = 5, 2
TIMING_SHARE = 0.35  # of a workload's time, kept for timing when compilation is slow
STEP_SECONDS, WALL_SECONDS, HOST_SECONDS, FORWARD_SECONDS, GRAPH_SECONDS = 3.0, 1.0, 0.5, 1.0, 0.5


class DeviceLostError(RuntimeError):
    """The device no longer answers this process."""


def run(
    settings: Settings,
    record: Record | Under,
    shape: HeadShape,
    skip: tuple[str, ...] = (),
    wanted: Wanted = ALL,
) -> None:
    """Measure a workload, and put what is found on record.

    Args:
        settings, record, shape: where and until when; what gets the results; sizes of the workload.
        skip: variants that an earlier process lost the device to; their like are spared, too.
        wanted: which variants, and whether the kernels of ours.
    """
    lost = set(skip) | (set(SAME_KERNELS) if set(skip) & set(SAME_KERNELS) else set())
    inputs = HeadInputs.of(shape, device=settings.device)
    describe(record, shape)
    exact = exact_outcome(inputs)
    preparing = replace(settings, deadline=settings.deadline - TIMING_SHARE * settings.seconds_left())
    ready: dict[str, Loss] = {}
    for name, variant in variants(settings.backend, shape).items():
        if wanted.variants is not None and name not in wanted.variants:
            continue
        if name in lost or preparing.seconds_left() < 0:
            reason = "the device was lost to its like" if name in lost else "no time left to prepare it"
            record.put("variants", name, value={"title": variant.title, "status": "skipped", "reason": reason})
            continue
        record.put("in_hand", value=name)
        loss = prepare(name, variant, inputs, exact, preparing, record)
        if loss is not None:
            ready[name] = loss
        refuse_lost_device(settings, record, name)
    record.put("in_hand", value=None)
    del exact
    measure(ready, inputs, settings, record)
    for name in (OURS, *BESIDE.values()):
        if name in ready and wanted.kernels:
            count_kernels(name, ready[name], inputs, record)
        if name in ready:
            look_into(name, ready[name], inputs, settings, record)


def describe(record: Record | Under, shape: HeadShape) -> None:
    """Put the workload's sizes on record."""
    sizes = {name: getattr(shape, name) for name in ("student_rows", "teacher_rows", "prototypes", "dim", "matched")}
    for name, value in {"name": shape.name, "flops": shape.flops, **sizes}.items():
        record.put(name, value=value)


def prepare(
    name: str,
    variant: Variant,
    inputs: HeadInputs,
    exact: tuple[Outcome, float],
    settings: Settings,
    record: Record | Under,
) -> Loss | None:
    """Compile a variant and check it; the record says what came of it. None where there is nothing to time."""
    start = time.monotonic()
    errors: dict[str, float] = {}

    def action() -> Loss:
        with limited(min(PREPARE_SECONDS, max(settings.seconds_left(), 1)), may_hang=not settings.dry):
            loss = variant.prepare(inputs, settings.compiler())
            outcome = outcome_of(loss, inputs)
        if variant.omits_teacher_entropy:
            outcome["loss"] = outcome["loss"] + exact[1]
        if variant.same_loss:
            errors.update(relative_errors(outcome, exact[0]))
            if not variant.is_ours:
                refuse_disagreement(errors)
        return loss

    loss, outcome = attempt(action)
    inputs.clear_gradients()
    entry: dict[str, Any] = {"title": variant.title, "is_ours": variant.is_ours, **outcome, "relative_errors": errors}
    if variant.is_ours and errors:  # timed all the same: its numbers help to find out why
        entry["disagreement"] = attempt(lambda: refuse_disagreement(errors))[1].get("reason")
    if loss is not None:
        step = training_step(loss, inputs)
        mib, memory = attempt(lambda: peak_extra_mib(step, inputs))
        entry |= {"extra_mib": mib} if mib is not None else memory
        loss = loss if mib is not None else None
    record.put("variants", name, value=entry | {"prepare_seconds": round(time.monotonic() - start, 2)})
    return loss


def measure(ready: dict[str, Loss], inputs: HeadInputs, settings: Settings, record: Record | Under) -> None:
    """Times of all variants, interleaved: on the device, for a waiting host, of the host itself, and of the forward pass."""
    stopwatch = Stopwatch(settings.device)
    steps = {name: training_step(loss, inputs) for name, loss in ready.items()}
    forwards = {name: probes.forward_step(loss, inputs) for name, loss in ready.items()}
    record.put("clocks_before", value=clocks())
    plan: list[tuple[str, Measure, dict[str, Step], float]] = [
        ("step_ms", stopwatch.device_milliseconds, steps, STEP_SECONDS),
        ("wall_ms", stopwatch.wall_milliseconds, steps, WALL_SECONDS),
        ("host_ms", stopwatch.host_milliseconds, steps, HOST_SECONDS),
        ("forward_ms", stopwatch.device_milliseconds, forwards, FORWARD_SECONDS),
    ]
    for key, how, which, seconds in plan:
        warm, total = warm_up(which, stopwatch, record, key)
        share = min(seconds, max(settings.seconds_left(), 0) / 4)
        rounds = DRY_ROUNDS if settings.dry else rounds_within(share, total, least=LEAST_ROUNDS)
        for name, times in interleaved(how, warm, rounds).items():
            record.put("variants", name, key, value=times._asdict())
            if key == "step_ms":
                record.put("variants", name, "tflops", value=inputs.shape.flops / times.median / 1e9)
    record.put("clocks_after", value=clocks())


def warm_up(
    steps: dict[str, Step], stopwatch: Stopwatch, record: Record | Under, key: str
) -> tuple[dict[str, Step], float]:
    """The steps that run, and the milliseconds of a round of them; the record says why the others do not."""
    warm, total = {}, 0.0
    for name, step in steps.items():
        milliseconds, outcome = attempt(lambda step=step: stopwatch.warm_up(step))  # type: ignore[misc]
        if milliseconds is None:
            record.put("variants", name, key, value=outcome)
            continue
        warm[name] = step
        total += 2 * milliseconds  # the backlog is about as long as the step
    return warm, total


def count_kernels(name: str, loss: Loss, inputs: HeadInputs, record: Record | Under) -> None:
    """The kernels that one of this library's variants launches, and their times."""
    kernels, outcome = attempt(lambda: probes.kernels(loss, inputs))
    record.put("variants", name, "kernels", value=outcome if kernels is None else kernels)


def look_into(name: str, loss: Loss, inputs: HeadInputs, settings: Settings, record: Record | Under) -> None:
    """Repeatability and graph replay of one of this library's variants."""
    repeatable, outcome = attempt(lambda: probes.is_repeatable(loss, inputs))
    record.put("variants", name, "repeatable", value=outcome if repeatable is None else repeatable)
    if settings.device.type != "cuda":
        record.put("variants", name, "graph", value={"status": "not available", "reason": "graphs need a GPU"})
        return
    graph, outcome = attempt(lambda: probes.captured(loss, inputs))
    record.put("variants", name, "graph", value=outcome)
    if graph is None:
        return
    replay, equal = graph
    stopwatch = Stopwatch(settings.device)
    rounds = rounds_within(GRAPH_SECONDS, 2 * stopwatch.warm_up(replay))
    times = interleaved(stopwatch.device_milliseconds, {"graph": replay}, rounds)["graph"]
    record.put("variants", name, "graph", value={**outcome, "equals_eager": equal, "step_ms": times._asdict()})


def compile_all(settings: Settings, record: Record | Under, shapes: tuple[HeadShape, ...]) -> None:
    """Run each baseline once on these workloads, so that later processes find what torch.compile caches on disk."""
    if settings.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(COMPILE_MEMORY_SHARE)  # the tests run beside it
    for shape in shapes:
        inputs = HeadInputs.of(shape, device=settings.device)
        for name, variant in variants(settings.backend, shape).items():
            if not variant.is_ours and name != "B1" and settings.seconds_left() > 0:
                _, outcome = attempt(lambda v=variant, i=inputs: compile_one(v, i, settings))  # type: ignore[misc]
                record.put(shape.name, name, value=outcome)
        torch.compiler.reset()  # or the next shape would count as a recompilation, of which there is a limit


def compile_one(variant: Variant, inputs: HeadInputs, settings: Settings) -> None:
    """One step of a variant."""
    with limited(min(PREPARE_SECONDS, max(settings.seconds_left(), 1)), may_hang=not settings.dry):
        outcome_of(variant.prepare(inputs, settings.compiler()), inputs)


def refuse_lost_device(settings: Settings, record: Record | Under, name: str) -> None:
    """After an illegal access every later call of the process fails: say who did it, and end."""
    if settings.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        record.put("device_lost_to", value=name)
        raise DeviceLostError(f"the device was lost to {name}: {error}") from error
