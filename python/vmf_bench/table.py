"""The record as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmf_bench.variants import BASELINE

COLUMNS = ("loss", "ms", "p10 - p90", f"x {BASELINE}", "extra MiB", "Gop/s", "of torch.mm", "of roof")
WIDTHS = (32, 8, 15, 11, 9, 8, 11, 8)
MARKS = {True: "*", False: " "}  # ours, theirs


def heading(record: Mapping[str, Any]) -> str:
    """The machine, and what was found right or wrong."""
    machine = record["machine"]
    sets = ", ".join(machine["instruction_sets"]) or "not known"
    amx = {True: "with AMX", False: "without AMX", None: "AMX not known"}[machine["amx"]]
    number = f" (family/model {machine['cpu_family_and_model']})" if machine["cpu_family_and_model"] else ""
    lines = [
        f"processor  {machine['cpu']}{number}, {machine['threads']} of {machine['cores']} cores used",
        f"           {sets}; {amx}",
        f"GPU        {machine['gpu'] or 'none'}",
        f"torch      {machine['torch']}, Python {machine['python']}, {machine['system']}",
    ]
    return "\n".join(lines)


def checks_table(checks: Sequence[Mapping[str, Any]]) -> str:
    """A line for each loss, pairing and dtype: the quantity that used most of its budget."""
    lines = [
        "Is it right? Value and gradients against the published loss in fp64; the budget is twice its own error in the dtype."
    ]
    for check in checks:
        where = f"  {check['name']:<14} {check['pairing']:<10} {check['dtype']:<8}"
        lines.append(f"{where} {check['status']}: {check.get('reason') or worst(check)}")
    return "\n".join(lines)


def case_title(case: Mapping[str, Any]) -> str:
    """For example "multi-crop 160/32 rows, K 16384, D 256, float32"."""
    rows = f"{case['student_rows']}/{case['teacher_rows']} rows"
    return f"{case['pairing']} {rows}, K {case['prototypes']}, D {case['dim']}, {case['dtype']}"


def case_table(case: Mapping[str, Any]) -> str:
    """The rows of a case, the fastest first, then those that did not run."""
    on = case["rows"][0]["on"] if case["rows"] else ""
    lines = [f"{case_title(case)} ({case['part']}), on {on}", "  " + _line(COLUMNS)]
    timed = sorted((row for row in case["rows"] if "median" in row), key=lambda row: float(row["median"]))
    for row in timed:
        lines.append(MARKS[row["is_ours"]] + " " + _line(_cells(row)))
    lines += [f"  {names}: {reason}" for reason, names in not_run(case).items()]
    lines.append(f"  {case_footer(case)}")
    return "\n".join(lines)


def not_run(case: Mapping[str, Any]) -> dict[str, str]:
    """Names of the losses that were not timed, by the reason."""
    names: dict[str, list[str]] = {}
    for row in case["rows"]:
        if "median" not in row:
            names.setdefault(f"{row['status']}: {row['reason']}", []).append(row["name"])
    return {reason: ", ".join(found) for reason, found in names.items()}


def case_footer(case: Mapping[str, Any]) -> str:
    """How it was measured, and what the roof consists of."""
    rounds = max((len(row["seconds"]) for row in case["rows"] if "seconds" in row), default=0)
    failed = f", of the start of the run, as it failed here ({case['mm_reason']})" if case.get("mm_reason") else ""
    roof, rate = case["roof"], case["rates"]["operations"] / 1e9
    parts = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in roof["parts"].items())
    return f"{rounds} rounds; torch.mm {rate:.4g} Gop/s{failed}; roof {1e3 * roof['seconds']:.3g} ms ({parts})"


def left_out(sentences: Sequence[str]) -> str:
    """The sizes without a table."""
    return "\n".join(["Not measured:", *(f"  {sentence}" for sentence in sentences)]) if sentences else ""


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns after the name of a row that was timed."""
    return _cells(row)[1:]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    speedup = row.get("speedup")
    return (
        row["name"],
        _milliseconds(row["median"]),
        f"{_milliseconds(row['p10'])} - {_milliseconds(row['p90'])}",
        "" if speedup is None else f"{speedup:.2f}",
        f"{row['extra_mib']:.1f}",
        f"{row['operations_per_second'] / 1e9:.1f}",
        f"{row['share_of_mm']:.2f}",
        f"{row['share_of_roof']:.2f}",
    )


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.2f}" if value < 0.1 else f"{value * 1e3:.0f}"


def _line(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f" {cell:>{width}}" for cell, width in rest)


def worst(check: Mapping[str, Any]) -> str:
    """The quantity that used most of its budget."""
    errors, budget = check["errors"], check["budget"]
    name = max(errors, key=lambda name: errors[name] / budget[name])
    return f"{name} off by {errors[name]:.1e}, budget {budget[name]:.1e}"
