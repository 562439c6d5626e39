"""The targets on a GPU, and whether a run reached them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.gpu.losses import BESIDE, OURS

MAIN_SIZES = {"prototypes": 65_536, "dim": 256}
SPEEDUPS = (((640, 128), "B1", 8.0), ((640, 128), "B2", 3.0), ((3771, 3771), "B1", 3.0), ((3771, 3771), "B2", 2.0))
RIVALS = ("B3", "B3g", "B4", "B5", "B6")
RIVAL_MEMORY = 1 / 5
RATES = (400.0, 550.0)  # TFLOP/s, counted as 8 (R_s + R_t) K D
LEAST_ROWS_FOR_RATE = 3771
PASSES_CASE = "D256 bfloat16"  # of the passes measured alone, that the rates are asked of
MOST_EXTRA_MIB = 100e6 / 2**20
HOST_ROWS = (640, 128)  # of the workload whose step the host must not hold up
MOST_DENSE_ERRORS = 2.0
TINY_ERROR = 1e-7  # relative: one rounding of an fp32 result, below which a ratio of errors is luck

Workload = Mapping[str, Any]


class Target(NamedTuple):
    """A target and its result; ``met`` is None if nothing was measured."""

    quantity: str
    to_reach: str
    measured: str
    met: bool | None


def targets(data: Mapping[str, Any], workloads: Sequence[Workload]) -> Iterator[Target]:
    """Every target, in the order of the design."""
    yield from _speedups(workloads)
    for workload in workloads:
        yield from _rivals(workload)
    for workload in workloads:
        for name in (OURS, *(other for other in BESIDE.values() if other in workload.get("variants", {}))):
            yield from _rates(workload, name)
            yield _memory(workload, name)
            yield from _steps(workload, name)
    yield from _passes(data)
    yield from _errors(data)


def _speedups(workloads: Sequence[Workload]) -> Iterator[Target]:
    for rows, baseline, least in SPEEDUPS:
        quantity, wanted = f"{rows[0]}/{rows[1]} vs {baseline}", f">= {least:g}x"
        found = [
            w for w in workloads if (w["student_rows"], w["teacher_rows"]) == rows and MAIN_SIZES.items() <= w.items()
        ]
        ratio = _ratio(found[0], baseline) if found else None
        yield Target(quantity, wanted, *((f"{ratio:.2f}x", ratio >= least) if ratio is not None else ("", None)))


def _rivals(workload: Workload) -> Iterator[Target]:
    ratios = {name: ratio for name in RIVALS if (ratio := _ratio(workload, name)) is not None}
    quantity = f"{workload['name']} vs best of B3 to B6"
    if not ratios:
        yield Target(quantity, "> 1x", "", None)
        return
    best = min(ratios, key=lambda name: ratios[name])
    yield Target(quantity, "> 1x", f"{ratios[best]:.2f}x ({best})", ratios[best] > 1)
    mine, theirs = (workload["variants"][name]["extra_mib"] for name in (OURS, best))
    yield Target(
        f"{workload['name']} memory of {best}", "< 1/5", f"{mine:.0f} of {theirs:.0f} MiB", mine < RIVAL_MEMORY * theirs
    )


def _rates(workload: Workload, name: str) -> Iterator[Target]:
    if workload["student_rows"] >= LEAST_ROWS_FOR_RATE:
        rate = _variant(workload, name).get("tflops")
        for least in RATES:
            measured = "" if rate is None else f"{rate:.0f} TFLOP/s"
            yield Target(
                f"{_called(workload, name)} rate",
                f">= {least:.0f} TFLOP/s",
                measured,
                None if rate is None else rate >= least,
            )


def _memory(workload: Workload, name: str) -> Target:
    extra = _variant(workload, name).get("extra_mib")
    measured = "" if extra is None else f"{extra:.0f} MiB"
    met = None if extra is None else extra <= MOST_EXTRA_MIB
    return Target(f"{_called(workload, name)} extra memory", f"<= {MOST_EXTRA_MIB:.0f} MiB", measured, met)


def _steps(workload: Workload, variant: str) -> Iterator[Target]:
    """Whether the host keeps up, a graph replays the step, and a repeat gives the same bits."""
    mine, called = _variant(workload, variant), _called(workload, variant)
    graph = mine.get("graph", {})
    if (workload["student_rows"], workload["teacher_rows"]) == HOST_ROWS and MAIN_SIZES.items() <= workload.items():
        host, step = (mine.get(key, {}).get("median") for key in ("host_ms", "step_ms"))
        measured, met = ("", None) if None in (host, step) else (f"{host:.3f} of {step:.3f} ms", host < step)
        yield Target(f"{called} host time", "< the device's", measured, met)
    equal = graph.get("equals_eager", False if graph.get("status") == "failed" else None)
    yield Target(f"{called} in a CUDA graph", "same bits", graph.get("status", ""), equal)
    repeatable = mine.get("repeatable")
    flag = repeatable if isinstance(repeatable, bool) else None
    yield Target(f"{called} repeated", "same bits", "" if flag is None else str(flag), flag)


def _passes(data: Mapping[str, Any]) -> Iterator[Target]:
    """The rate of each pass alone, and whether csrc/cuda is faster than Triton in it."""
    for name, entry in data["results"].get("passes", {}).get("passes", {}).get(PASSES_CASE, {}).items():
        wrong = entry.get("wrong", {})
        rates = {backend: entry.get(backend, {}).get("tflops") if backend not in wrong else None for backend in BESIDE}
        cuda, triton = rates["cuda"], rates["triton"]
        measured = "" if cuda is None else f"{cuda:.0f} TFLOP/s"
        quantity = f"cuda, {name} pass alone, {PASSES_CASE}"
        yield Target(quantity, f">= {RATES[-1]:.0f} TFLOP/s", measured, None if cuda is None else cuda >= RATES[-1])
        ratio = None if cuda is None or triton is None else cuda / triton
        measured = "" if ratio is None else f"{ratio:.2f}x"
        yield Target(quantity, "> 1x Triton", measured, None if ratio is None else ratio > 1)


def _errors(data: Mapping[str, Any]) -> Iterator[Target]:
    results = data["results"].get("errors", {})
    checks: list[tuple[str, str, Callable[[float, float], bool]]] = [
        ("dense", "<= 2x the dense formula's", lambda mine, other: mine <= max(MOST_DENSE_ERRORS * other, TINY_ERROR)),
        ("autocast", "<= 2x bf16 autocast's", lambda mine, other: mine <= max(MOST_DENSE_ERRORS * other, TINY_ERROR)),
    ]
    for kind, wanted, holds in checks:
        pairs = [
            (f"{case}, {quantity}", error, result[kind][quantity])
            for case, result in results.items()
            for quantity, error in result.get("ours", {}).items()
            if quantity in result.get(kind, {})
        ]
        over = [name for name, mine, other in pairs if not holds(mine, other)]
        worst = max((mine / max(other, TINY_ERROR) for _, mine, other in pairs), default=0.0)
        measured = f"{len(pairs) - len(over)} of {len(pairs)} quantities, worst {worst:.1f}x" if pairs else ""
        yield Target("errors", wanted, measured, not over if pairs else None)


def _ours(workload: Workload) -> Mapping[str, Any]:
    return _variant(workload, OURS)


def _variant(workload: Workload, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = workload.get("variants", {}).get(name, {})
    return found


def _called(workload: Workload, name: str) -> str:
    called: str = workload["name"]
    return called if name == OURS else f"{called} {name}"


def _ratio(workload: Workload, baseline: str) -> float | None:
    """Median time of the baseline over ours; None where either was not timed, or ours is wrong."""
    times = [workload.get("variants", {}).get(name, {}).get("step_ms", {}).get("median") for name in (baseline, OURS)]
    if None in times or _ours(workload).get("disagreement"):
        return None
    ratio: float = times[0] / times[1]
    return ratio
