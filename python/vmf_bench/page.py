"""The record as one page of HTML that needs nothing else: tables, scaling, roofline, memory, and the record itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from vmf_bench import table
from vmf_bench.attempts import FAULTS
from vmf_bench.charts import COLOURS, OTHER_COLOUR, Points, chart
from vmf_bench.json_text import json_in_html
from vmf_bench.plan import MAIN, PROTOTYPES, REDUCED, ROWS
from vmf_bench.variants import BASELINE

Mapped = Mapping[str, Any]

LEAST_MIB = 0.1  # a logarithmic axis has no 0
NUMBERS = ("median", "p10", "speedup", "extra_mib", "operations_per_second", "share_of_mm", "share_of_roof")
PARTS = {
    MAIN: "main size",
    REDUCED: "fewer prototypes, because 16-bit products are slow here",
    ROWS: "another number of rows",
    PROTOTYPES: "another number of prototypes",
}
CHECKED = """Value and gradients at small sizes against the published loss in fp64, as relative errors. Each may be
off by twice what the published loss is off in the same dtype, plus a rounding. A line shows the quantity that uses
most of its budget. At the sizes below, every loss was compared with the published one again."""
EXPLAINED = f"""Every loss computes the value and the gradients at the rows, the norms and the directions of the
prototypes. Each round runs all of them once, one after the other, and torch.mm as well. "ms" is the median of the
rounds. "x {BASELINE}" is the time of the published loss over that of the row: above 1 the row is faster, below 1
slower. "Extra" is the peak of the memory that a step takes beyond its inputs and the gradients that it leaves.
"Gop/s" counts for every row the operations that no loss avoids, whatever it computes again, so that rows can be compared;
"of torch.mm" is that over the rate of torch.mm in the same rounds. "Of roof" is the least time of a step over the time
that it took. The least time is that of its products at the rate of torch.mm, of one exponential for each logit at the
rate of torch.exp on a tensor, and of its least memory traffic at the rate of a copy. A share above 1 means that torch.mm
or torch.exp is not the best that the part can do: where a processor has no 16-bit products, torch.mm imitates them, and
this library multiplies such rows in fp32; on a GPU torch.exp waits for memory."""


def page(record: Mapped) -> str:
    """HTML of a record."""
    folder = resources.files("vmf_bench")
    style, script = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json_in_html(record)
    body = "".join(_sections(record))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vmf-bench</title><style>{style}</style></head><body>{body}"
        f'<script type="application/json" id="record">{data}</script><script>{script}</script></body></html>\n'
    )


def _sections(record: Mapped) -> Iterator[str]:
    yield f"<h1>vmf-bench</h1>{_machine(record)}"
    yield f"<h2>Is it right?</h2>{_checks(record['checks'])}"
    yield f"<h2>How fast?</h2><p>{escape(EXPLAINED)}</p>"
    curves = [case for case in record["cases"] if case["part"] in (ROWS, PROTOTYPES)]
    yield from (_case(case) for case in record["cases"] if case not in curves)
    yield f"<h2>Charts</h2>{_legend(record)}<div class='charts'>{''.join(_charts(record))}</div>"
    yield f"<h2>The points of the scaling charts</h2>{''.join(map(_case, curves))}" if curves else ""
    if record["left_out"]:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in record["left_out"])
        yield f"<h2>Not measured</h2><ul>{items}</ul>"


def _machine(record: Mapped) -> str:
    machine = record["machine"]
    facts = {
        "command": record["command"],
        "processor": f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores used",
        "family/model": machine["cpu_family_and_model"] or "not known",
        "instruction sets": ", ".join(machine["instruction_sets"]) or "not known",
        "AMX": {True: "yes", False: "no", None: "not known"}[machine["amx"]],
        "GPU": machine["gpu"] or "none",
        "versions": f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}",
        "time": f"{record['seconds']:.0f} s of {record['budget_seconds']:.0f} s",
    }
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _checks(checks: Sequence[Mapped]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("loss", "pairing", "dtype", "result"))
    rows = []
    for check in (check for check in checks if check["status"] != "not available"):
        first = "".join(f"<td>{escape(check[name])}</td>" for name in ("name", "pairing", "dtype"))
        kind = "wrong" if check["status"] in FAULTS else "reason"
        said = f"{check['status']}: {check.get('reason') or table.worst(check)}"
        rows.append(f'<tr>{first}<td class="{kind}">{escape(said)}</td></tr>')
    absent = dict.fromkeys(f"{c['name']}: {c['reason']}." for c in checks if c["status"] == "not available")
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<p>{escape(CHECKED)}</p><div class='scroll'>{body}</div><p>{escape(' '.join(absent))}</p>"


def _case(case: Mapped) -> str:
    head = "".join(f"<th><button>{escape(name)}</button></th>" for name in table.COLUMNS)
    timed = sorted((row for row in case["rows"] if "median" in row), key=lambda row: float(row["median"]))
    others = [row for row in case["rows"] if "median" not in row]
    rows = "".join(_row(row) for row in [*timed, *others])
    title = f"{table.case_title(case)} ({PARTS[case['part']]})"
    below = f"On {case['rows'][0]['on']}. {table.case_footer(case)}." if case["rows"] else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h3>{escape(title)}</h3><div class='scroll'>{body}</div><p>{escape(below)}</p>"


def _row(row: Mapped) -> str:
    mine = ' class="mine"' if row["is_ours"] else ""
    name = f'<td data-value="{escape(row["name"], quote=True)}" title="{escape(row["title"], quote=True)}">'
    first = f"{name}{escape(row['name'])}</td>"
    if "median" in row:
        numbers = zip(NUMBERS, table.cells(row), strict=True)
        rest = "".join(
            f'<td data-value="{row[key] if row[key] is not None else ""}">{cell}</td>' for key, cell in numbers
        )
        return f"<tr{mine}>{first}{rest}</tr>"
    kind = "wrong" if row["status"] in FAULTS else "reason"
    said = escape(f"{row['status']}: {row['reason']}")
    return f'<tr{mine}>{first}<td class="{kind}" colspan="{len(NUMBERS)}">{said}</td></tr>'


def _legend(record: Mapped) -> str:
    names = dict.fromkeys(row["name"] for case in record["cases"] for row in case["rows"] if "median" in row)
    boxes = []
    for name in names:
        dot, value = f'<i style="background:{COLOURS.get(name, OTHER_COLOUR)}"></i>', escape(name, quote=True)
        boxes.append(f'<label><input type="checkbox" value="{value}" checked>{dot}{value}</label>')
    return f'<div class="legend">{"".join(boxes)}</div>'


def _charts(record: Mapped) -> Iterator[str]:
    curves = (
        (ROWS, "student_rows", "student rows"),
        (PROTOTYPES, "prototypes", "prototypes K"),
    )
    quantities: tuple[tuple[str, str, Callable[[Mapped], float]], ...] = (
        ("time", "milliseconds", lambda row: 1e3 * row["median"]),
        ("extra memory", f"MiB, at least {LEAST_MIB}", lambda row: max(row["extra_mib"], LEAST_MIB)),
    )
    for title, unit, value in quantities:
        for part, key, label in curves:
            cases = _curve(record, part)
            if len({case[key] for case in cases}) > 1:
                where = f"{cases[0]['pairing']}, {cases[0]['dtype']}"
                yield _figure(chart(_series(cases, key, value), label, unit), f"{title} against {label}; {where}")
    if record["cases"]:
        caption = "roofline, all sizes: a step that moves each byte once lies below the line of its dtype"
        yield _figure(_roofline(record["cases"]), caption)


def _curve(record: Mapped, part: str) -> list[Mapped]:
    """The main case of the scaling curves, and those that differ from it in one size."""
    own = [case for case in record["cases"] if case["part"] == part]
    main = [case for case in record["cases"] if case["part"] == MAIN]
    return [*main[:1], *own] if own else []


def _series(cases: Sequence[Mapped], key: str, value: Callable[[Mapped], float]) -> dict[str, Points]:
    series: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for row in case["rows"]:
            if "median" in row:
                series.setdefault(row["name"], []).append((case[key], value(row)))
    return {**series}


def _roofline(cases: Sequence[Mapped]) -> str:
    """Operations for each byte that a step has to move, against operations a second; a roof for each dtype."""
    series: dict[str, list[tuple[float, float]]] = {}
    intensities = [case["roof"]["operations"] / case["roof"]["bytes"] for case in cases]
    lines: dict[str, Points] = {}
    for case, intensity in zip(cases, intensities, strict=True):
        rates = case["rates"]
        ends = min(intensities) / 2, max(intensities) * 2
        knee = min(max(rates["operations"] / rates["bytes"], ends[0]), ends[1])
        steps = sorted({ends[0], knee, ends[1]})
        label = f"torch.mm and copy, {case['dtype']}"
        lines.setdefault(label, [(x, min(rates["operations"], rates["bytes"] * x) / 1e9) for x in steps])
        for row in case["rows"]:
            if "median" in row:
                series.setdefault(row["name"], []).append((intensity, row["operations_per_second"] / 1e9))
    return chart(series, "operations a byte", "Gop/s", lines, joined=False)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
