"""Rates of the row pass and the column pass alone, for the library's backends on a GPU, interleaved.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.hang import limited
from bench.gpu.head import refuse_lost_device
from bench.gpu.record import Record, attempt
from bench.gpu.settings import Settings
from bench.light.differences import compared
from bench.light.exact import Exact
from bench.light.inputs import Array
from bench.pass_case import MANY_ROWS, PROTOTYPES, PassCase, relative_error
from vmf_bench.errors import UnavailableError
from vmf_bench.timing import Step, Stopwatch, interleaved, rounds_within
from vmf_kernels.backends.choice import BACKENDS

BACKENDS_BESIDE = (
    "triton",
    "cuda",
    "cuda clusters",  # its kernels in clusters of two blocks: no backend takes them yet
)  # of the library, that have kernels for a GPU; the first is what others are compared with
PASSES = {"student": "row pass, keys as values", "teacher": "row pass, own values", "columns": "column pass"}
SECONDS = 0.3  # for each pass at each size
MOST_SECONDS = 15.0  # of one pass: Triton's compiler may take most of it
LARGEST_DIFFERENCE = 0.02  # relative, between two backends in 16 bits
# of an element, relative to itself and to its tensor's root mean square: 16-bit rounding is a tenth of it
ELEMENT_TOLERANCE = 0.05
DESCRIBED_ROWS = 4096  # of a wrong tensor, where all 65,536 would take seconds
BLOCK = 128  # rows or prototypes of the largest block of threads
AXES = {
    "vectors": ("prototype", "column"),
    "usage": ("prototype",),
    "barycentre": ("row", "column"),
    "log_sum_exp": ("row",),
}

Hold = Callable[[str | None], None]  # says which backend's kernels are about to run for the first time


class Case(NamedTuple):
    """One embedding dim and one dtype."""

    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """For example "D256 bfloat16"."""
        return f"D{self.width} {str(self.dtype).removeprefix('torch.')}"


CASES = (
    Case(256, torch.bfloat16),
    Case(256, torch.float16),
    Case(384, torch.bfloat16),
    Case(128, torch.bfloat16),
)


def run(settings: Settings, record: Record, widths: tuple[int, ...], skip: tuple[str, ...] = ()) -> None:
    """Every pass of the cases of these widths that is reached in time; ``skip`` names backends to leave out.

    First without the variant that no backend takes yet: should it hang, what the others reach is known by then.
    """
    record.put("rows", value=MANY_ROWS)
    record.put("prototypes", value=PROTOTYPES)
    newest = BACKENDS_BESIDE[-1]
    for left_out in (skip,) if is_left_out(newest, skip) else ((*skip, newest), skip):
        for case in (case for case in CASES if case.width in widths):
            for name in PASSES:
                if settings.seconds_left() >= 0:
                    put(settings, record, case, name, left_out)
                elif name not in record.data.get("passes", {}).get(case.name, {}):
                    record.put("passes", case.name, name, value={"status": "skipped", "reason": "no time left"})


def put(settings: Settings, record: Record, case: Case, name: str, skip: tuple[str, ...]) -> None:
    """Measure one pass, and record what came of it."""
    if settings.dry:
        reason = "a dry run measures no pass: they have the sizes of a GPU"
        record.put("passes", case.name, name, value={"status": "not available", "reason": reason})
        return

    def hold(backend: str | None) -> None:
        record.put("in_hand", value=backend)  # whom to leave out should this process not come back

    def action() -> dict[str, Any]:
        with limited(max(min(settings.seconds_left(), MOST_SECONDS), 1), may_hang=True):
            return measure(case, name, settings.device, skip, hold=hold)

    result, outcome = attempt(action)
    record.put("passes", case.name, name, value=outcome | (result or {}))
    # the one in hand, or, of those that were timed in turns, the newest
    refuse_lost_device(settings, record, record.data.get("in_hand") or BACKENDS_BESIDE[0])
    hold(None)


def kernels_on(case: Case, device: torch.device, skip: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """``operator.Kernels`` of the backends that run there, and why the others do not."""
    rows = torch.empty(1, case.width, dtype=case.dtype, device=device)
    reasons = {
        name: "an earlier run did not come back from it"
        if is_left_out(name, skip)
        else BACKENDS[backend_of(name)].unsupported(rows, rows)
        for name in BACKENDS_BESIDE
    }
    found = {name: _kernels(name) for name, reason in reasons.items() if reason is None}
    return found, {name: reason for name, reason in reasons.items() if reason is not None}


def backend_of(name: str) -> str:
    """Whose kernels these are: "cuda" for "cuda clusters"."""
    return name.split()[0]


def is_left_out(name: str, skip: tuple[str, ...]) -> bool:
    """Whether it is to be skipped, or the backend that it is a variant of."""
    return name in skip or backend_of(name) in skip


def _kernels(name: str) -> Any:
    if backend_of(name) == "cuda":
        from vmf_kernels.backends.cuda.passes import CUDA, CUDA_CLUSTERS

        return CUDA_CLUSTERS if name == "cuda clusters" else CUDA
    from vmf_kernels.backends.triton.operator import TRITON

    return TRITON


def measure(
    case: Case, name: str, device: torch.device, skip: tuple[str, ...] = (), hold: Hold = lambda backend: None
) -> dict[str, Any]:
    """Times and rates by backend, and how far their results are apart; one that is wrong says where, and is timed too.

    Raises:
        UnavailableError: no backend runs there.
    """
    found, reasons = kernels_on(case, device, skip)
    if not found:
        raise UnavailableError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    inputs = PassCase.of(name, "16-bit", case.width, device=device, dtype=case.dtype)
    result: dict[str, Any] = {name: {"status": "not available", "reason": reason} for name, reason in reasons.items()}
    return result | {"operations": inputs.operations, **disagreement(inputs, found, hold), **rates(inputs, found)}


def disagreement(inputs: PassCase, found: Mapping[str, Any], hold: Hold) -> dict[str, Any]:
    """Relative difference of each backend's result from the first one's, and where it lies if it is more than rounding."""
    first, *others = found
    expected = inputs.results(tile_of(inputs, found[first]), found[first])
    errors, wrong = dict[str, float](), dict[str, Any]()
    for name in others:
        hold(name)
        got = inputs.results(tile_of(inputs, found[name]), found[name])
        errors[name] = relative_error(got, expected)
        if not errors[name] <= LARGEST_DIFFERENCE:
            wrong[name] = wrong_elements(inputs.name, got, expected)
    return {"difference": errors, "wrong": wrong}


def wrong_elements(name: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """Where the tensors of a pass are wrong, by name, as first light describes it; NaN is wrong.

    Counted over the whole; described in the ``window`` of rows from the first wrong block on, from which places count.
    """
    found = {}
    for tensor in expected:
        right, value = expected[tensor].double(), got[tensor].double()  # compared here as they are on the host
        allowed = ELEMENT_TOLERANCE * (right.abs() + right.nan_to_num().square().mean().sqrt())
        is_wrong = (value != right) & ~((value - right).abs() <= allowed)  # the same infinity is right
        if not is_wrong.any():
            continue
        start = int(is_wrong.reshape(len(right), -1).any(1).nonzero()[0]) // BLOCK * BLOCK
        window = slice(start, start + DESCRIBED_ROWS)
        exact = Exact(_on_host(right[window]), _on_host(allowed[window]), AXES[tensor])
        difference = compared(name, tensor, _on_host(value[window]), exact)
        assert difference is not None, "the window starts with a wrong block"
        counts = {"wrong": int(is_wrong.sum()), "of": right.numel(), "window": [start, start + len(exact.value)]}
        found[tensor] = difference.report | counts
    return found


def _on_host(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array


def rates(inputs: PassCase, found: Mapping[str, Any]) -> dict[str, Any]:
    """Times of one launch, interleaved, and TFLOP/s of the products."""
    stopwatch = Stopwatch(inputs.rows.device)
    steps = {name: step_of(inputs, kernels) for name, kernels in found.items()}
    total = sum(stopwatch.warm_up(step) for step in steps.values())
    times = interleaved(stopwatch.device_milliseconds, steps, rounds_within(SECONDS, 2 * total))
    return {
        name: {"status": "ok", "ms": ms._asdict(), "tflops": inputs.operations / ms.median / 1e9}
        for name, ms in times.items()
    }


def step_of(inputs: PassCase, kernels: Any) -> Step:
    """One launch."""
    tile = tile_of(inputs, kernels)
    return lambda: inputs.run(tile, kernels)


def tile_of(inputs: PassCase, kernels: Any) -> Any:
    """The tile that the kernels pad to in this pass."""
    return kernels.tile(inputs.name, inputs.rows, inputs.layout)
