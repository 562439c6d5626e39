"""Markdown from a GPU's ``head.json``: times, ratios, targets, kernels, errors, and why something was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.baselines import BASELINES
from bench.gpu.losses import BESIDE, OURS
from bench.gpu.targets import Target, targets

TIME_COLUMNS = (
    "| workload | variant | fwd+bwd ms | p10 - p90 | vs ours | waiting host ms | host alone ms | forward ms "
    "| TFLOP/s | of cuBLAS | extra MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
TARGET_COLUMNS = "| quantity | to reach | measured | met |\n|---|---|---|---|"
PASS_COLUMNS = "| case | pass | backend | ms | TFLOP/s | of cuBLAS | difference |\n|---|---|---|---|---|---|---|"
KERNEL_COLUMNS = "| workload | pass | kernel | launches | us |\n|---|---|---|---|---|"
ERROR_COLUMNS = "| case | quantity | ours | dense | bf16 autocast | within budget |\n|---|---|---|---|---|---|"
MISSING_COLUMNS = "| what | status | reason |\n|---|---|---|"
MOST_KERNEL_ROWS = 8
REASON_LENGTH = 160
KERNEL_NAME_LENGTH = 60


def gpu_table(data: Mapping[str, Any]) -> str:
    """Every table of a run."""
    device, versions = data["environment"]["device"], data["environment"]["versions"]
    ceilings = data["results"].get("ceilings", {})
    lines = [
        f"{device['name']}, driver {data['environment']['driver']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {(data['environment']['commit'] or 'unknown')[:10]}"
        + f", sources {data['environment'].get('sources', 'unknown')}"
        + (", with uncommitted changes" if data["environment"]["uncommitted_changes"] else ""),
        f"Ceilings: bf16 matmul {_number(ceilings.get('matmul_tflops'))} TFLOP/s, "
        f"copy {_number(ceilings.get('copy_gb_per_s'))} GB/s. Clocks before {data['clocks_before'].get('clocks.sm')}, "
        f"after {data.get('clocks_after', {}).get('clocks.sm')}. {_tests(data['stages'])}",
    ]
    if data["dry_run"]:
        lines.insert(0, "DRY RUN at toy sizes on the CPU: it proves the script, the numbers mean nothing.\n")
    tables = (_times, _passes, _targets, _kernels, _errors, _missing)
    return "\n".join(lines) + "".join("\n\n" + "\n".join(table(data)) for table in tables)


def short_table(data: Mapping[str, Any]) -> str:
    """A row a workload: ours, the others' time over ours or why there is none, and what went wrong."""
    beside = [BESIDE[data["backend"]]] if data["backend"] in BESIDE else []
    rivals = [*beside, *BASELINES, "streaming", "logits", "ours vMF", "DINOLoss"]
    lines = ["| workload | ours ms | host ms | graph ms | TFLOP/s | extra MiB | kernels | " + " | ".join(rivals) + " |"]
    lines.append("|---" * (7 + len(rivals)) + "|")
    for workload in workloads(data):
        variants = workload.get("variants", {})
        mine = variants.get(OURS, {"status": "not reached"})
        step, counted = _median(mine, "step_ms"), mine.get("kernels", {})
        cells = [
            workload["name"],
            mine["status"] if step is None else f"{step:.3f}" + (" WRONG" if mine.get("disagreement") else ""),
            _number(_median(mine, "host_ms"), 3),
            _number(_median(mine.get("graph", {}), "step_ms"), 3),
            _number(mine.get("tflops")),
            _number(mine.get("extra_mib")),
            "+".join(f"{counted[way]['launches']:g}" for way in ("forward", "backward") if way in counted),
        ]
        cells += [_against(step, variants.get(name, {})) for name in rivals]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{stage}: {entry['status']}" for stage, entry in data["stages"].items() if entry["status"] != "ok"]
    missed = [f"{t.quantity} {t.measured} ({t.to_reach})" for t in targets(data, workloads(data)) if t.met is False]
    lines += ["", f"Stages not ok: {', '.join(failed) or 'none'}. {_tests(data['stages'])}"]
    return "\n".join([*lines, f"Targets not met: {'; '.join(missed) or 'none'}."])


def _against(mine: float | None, variant: Mapping[str, Any]) -> str:
    step = _median(variant, "step_ms")
    if step is None:
        status: str = variant.get("status", "")
        return status
    return f"{step / mine:.2f}x" if mine else f"{step:.3f} ms"


def workloads(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Results of the head stages that got as far as a name; where two had a workload, those of the one that timed more.

    Times of different stages are never mixed: a ratio is of one process's interleaved runs.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for stage, result in data["results"].items():
        if stage.split()[0] in ("head", "rivals", "heads"):
            for entry in [result] if "name" in result else result.values():
                name = entry["name"]
                found[name] = _better(found[name], entry) if name in found else entry
    return list(found.values())


def _better(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> Mapping[str, Any]:
    """The workload of which more was timed, with the kernels that the other found."""
    best, other = (later, earlier) if _timed(later) >= _timed(earlier) else (earlier, later)
    variants = dict(best.get("variants", {}))
    for name, variant in other.get("variants", {}).items():
        if "kernels" in variant and name in variants:
            variants[name] = {"kernels": variant["kernels"]} | variants[name]
    return {**best, "variants": variants}


def _timed(workload: Mapping[str, Any]) -> int:
    return sum(_median(variant, "step_ms") is not None for variant in workload.get("variants", {}).values())


def _times(data: Mapping[str, Any]) -> Iterator[str]:
    yield TIME_COLUMNS
    roof = data["results"].get("ceilings", {}).get("matmul_tflops")
    for workload in workloads(data):
        mine = _median(workload.get("variants", {}).get(OURS, {}), "step_ms")
        for name, variant in workload.get("variants", {}).items():
            step = _median(variant, "step_ms")
            if step is not None:
                yield _time_row(workload, name, variant, mine, roof)
            graph = variant.get("graph", {})
            replay = _median(graph, "step_ms")
            if replay is not None:
                spread = f"{graph['step_ms']['p10']:.3f} - {graph['step_ms']['p90']:.3f}"
                ratio = f"{replay / mine:.2f}x" if mine else ""
                yield f"| {workload['name']} | {name}, CUDA graph | {replay:.3f} | {spread} | {ratio} | | | | | | |"


def _time_row(
    workload: Mapping[str, Any], name: str, variant: Mapping[str, Any], mine: float | None, roof: float | None
) -> str:
    times, rate = variant["step_ms"], variant["tflops"]
    cells = [
        workload["name"],
        f"{name}: {variant['title']}" + (" (WRONG, see below)" if variant.get("disagreement") else ""),
        f"{times['median']:.3f}",
        f"{times['p10']:.3f} - {times['p90']:.3f}",
        f"{times['median'] / mine:.2f}x" if mine else "",
        _number(_median(variant, "wall_ms"), 3),
        _number(_median(variant, "host_ms"), 3),
        _number(_median(variant, "forward_ms"), 3),
        f"{rate:.0f}",
        f"{100 * rate / roof:.0f} %" if roof else "",
        _number(variant.get("extra_mib")),
    ]
    return f"| {' | '.join(cells)} |"


def _targets(data: Mapping[str, Any]) -> Iterator[str]:
    yield TARGET_COLUMNS
    for target in targets(data, workloads(data)):
        yield _target_row(target, data["dry_run"])


def _target_row(target: Target, dry_run: bool) -> str:
    verdict = "dry run" if dry_run else {True: "yes", False: "**no**", None: "not measured"}[target.met]
    return f"| {target.quantity} | {target.to_reach} | {target.measured} | {verdict} |"


def _kernels(data: Mapping[str, Any]) -> Iterator[str]:
    yield KERNEL_COLUMNS
    for workload in workloads(data):
        for variant, name, recorded in _recorded_kernels(workload):
            called = workload["name"] if variant == OURS else f"{workload['name']} {variant}"
            total = f"| {called} | {name} | all | {recorded['launches']:g} | {recorded['microseconds']:.0f} |"
            yield total
            for kernel in recorded["by_name"][:MOST_KERNEL_ROWS]:
                label = kernel["name"][:KERNEL_NAME_LENGTH].replace("|", "/")
                yield f"| | | `{label}` | {kernel['count']:g} | {kernel['microseconds']:.0f} |"


def _recorded_kernels(workload: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for variant in (OURS, *BESIDE.values()):
        for name, recorded in workload.get("variants", {}).get(variant, {}).get("kernels", {}).items():
            if isinstance(recorded, Mapping):  # or it is a reason why there are none
                yield variant, name, recorded


def _passes(data: Mapping[str, Any]) -> Iterator[str]:
    yield PASS_COLUMNS
    roof = data["results"].get("ceilings", {}).get("matmul_tflops")
    for case, entries in data["results"].get("passes", {}).get("passes", {}).items():
        for name, entry in entries.items():
            for backend in BESIDE:
                found = entry.get(backend, entry)
                if found["status"] != "ok":
                    yield f"| {case} | {name} | {backend} | {found['status']} | | | |"
                elif "tflops" in found:
                    share = f"{100 * found['tflops'] / roof:.0f} %" if roof else ""
                    cells = [f"{found['ms']['median']:.3f}", f"{found['tflops']:.0f}", share]
                    off = _small(entry.get("difference", {}).get(backend))
                    cells.append(f"{off} WRONG" if backend in entry.get("wrong", {}) else off)
                    yield f"| {case} | {name} | {backend} | {' | '.join(cells)} |"


def _errors(data: Mapping[str, Any]) -> Iterator[str]:
    yield ERROR_COLUMNS
    for case, result in data["results"].get("errors", {}).items():
        within = {True: "yes", False: "**no**", None: ""}[result.get("within_budget")]
        for quantity, error in result.get("ours", {}).items():
            others = [_small(result.get(kind, {}).get(quantity)) for kind in ("dense", "autocast")]
            yield f"| {case} | {quantity} | {_small(error)} | {' | '.join(others)} | {within} |"


def _missing(data: Mapping[str, Any]) -> Iterator[str]:
    yield MISSING_COLUMNS
    for stage, outcome in data["stages"].items():
        if outcome["status"] != "ok":
            yield _missing_row(f"stage {stage}", outcome)
    for case, result in data["results"].get("errors", {}).items():
        if result["status"] != "ok":
            yield _missing_row(f"errors of {case}", result)
        elif result.get("within_budget") is False:
            yield _missing_row(f"errors of {case}", {"status": "over budget", "reason": result["budget"]})
    for workload in workloads(data):
        for name, variant in workload.get("variants", {}).items():
            if variant["status"] != "ok":
                yield _missing_row(f"{workload['name']} {name}", variant)
            elif variant.get("disagreement"):
                yield _missing_row(f"{workload['name']} {name}", {"status": "wrong", "reason": variant["disagreement"]})
            for key in ("kernels", "graph", "step_ms", "wall_ms", "forward_ms"):
                outcome = variant.get(key, {})
                if isinstance(outcome, Mapping) and "reason" in outcome:
                    yield _missing_row(f"{workload['name']} {name}, {key}", outcome)


def _missing_row(what: str, outcome: Mapping[str, Any]) -> str:
    # the head of a library's message says what it is, the tail of a process's output says why it ended
    words = " ".join(str(outcome.get("reason", "")).split()).replace("|", "/")
    reason = (
        words if len(words) <= REASON_LENGTH else f"{words[: REASON_LENGTH // 2]} ... {words[-REASON_LENGTH // 2 :]}"
    )
    return f"| {what} | {outcome['status']} | {reason} |"


def _tests(stages: Mapping[str, Any]) -> str:
    sentences = []
    for what in ("cuda", "gpu", "memory"):
        if (tests := stages.get(f"tests {what}")) is not None:
            failed = ", ".join(tests.get("failed", [])[:5])
            sentences.append(
                f"Tests {what}: {tests['status']}, {tests.get('tests', 'none')} of {tests.get('selected', '?')} run, "
                f"{tests.get('failures', '?')} failed{f' ({failed})' if failed else ''}."
            )
    for what in ("cuda", "triton"):
        light, sanitizer = stages.get(f"first light {what}"), stages.get(f"sanitizer {what}")
        if light is not None:
            sentences.append(f"First light of {what}: {light['status']}.")
        if sanitizer is not None:
            found = "found errors" if sanitizer.get("found_errors") else sanitizer["status"]
            sentences.append(f"Memory check of {what}: {found}.")
    return " ".join(sentences) or "No tests."


def _median(holder: Mapping[str, Any], key: str) -> float | None:
    median: float | None = holder.get(key, {}).get("median")
    return median


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
