"""Prints the tables of the README from committed results.

python -m bench.report bench/results/cpu/head.json
python -m bench.report bench/results/cpu/first_call.json
python -m bench.report bench/results/cpu/demo.json
python -m bench.report bench/results/cpu/many_prototypes.json
python -m bench.report bench/results/cpu/shapes.json
python -m bench.report bench/results/<name of a GPU>/head.json     with the ratios and whether each target was met
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.tables import gpu_table
from bench.shapes import bound_ms, over_the_best

HEAD_COLUMNS = (
    "| step | rows | baseline ms | ours ms | speed-up | baseline extra MiB | ours extra MiB | rate / torch.mm |\n"
    "|---|---|---|---|---|---|---|---|"
)
DEMO_COLUMNS = (
    "| method | seed | k-NN % | untrained | raw pixels | linear % | untrained | raw pixels "
    "| MI nats | RankMe | used | unique |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)
FIRST_CALL_COLUMNS = (
    "| backend | threads | first call ms | peak MiB more | modules loaded "
    "| later calls us | the fastest us | wake-ups a call |\n"
    "|---|---|---|---|---|---|---|---|"
)
MANY_COLUMNS = (
    "| ranks | prototypes | dim | rows | seconds | peak MiB of a rank | one copy of the logits GiB | machine's memory GiB |\n"
    "|---|---|---|---|---|---|---|---|"
)
SHAPE_COLUMNS = (
    "| pairs | rows | prototypes | dim | dtype | threads | ours ms | spread | native | streaming | published | one softmax "
    "| compiled | ours / best | products at torch.mm's rate |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)
ACCURACIES = ("knn", "knn_untrained", "knn_pixels", "linear", "linear_untrained", "linear_pixels")
MEDIANS = (*ACCURACIES, "mutual_information", "rankme")


def head_table(results: Mapping[str, Any]) -> str:
    """Markdown table of a pytest-benchmark JSON of ``bench_head``: medians, each against its interleaved baseline."""
    rows = [HEAD_COLUMNS]
    for result in results["benchmarks"]:
        extra, step = result["extra_info"], result["name"].split("[")[0].removeprefix("test_").replace("_", " ")
        options = result["name"].split("[")[1].rstrip("]").split("-")
        name = " ".join([step, *(option for option in options if not option.isdigit())])
        memory = [f"{extra[key]:.0f}" if key in extra else "" for key in ("baseline_extra_mib", "extra_mib")]
        times = f"{1e3 * extra['baseline_median_seconds']:.0f} | {1e3 * result['stats']['median']:.0f}"
        workload = "/".join(option for option in options if option.isdigit())
        rate = f"{extra['rate_over_mm']:.2f}" if "rate_over_mm" in extra else ""
        rows.append(f"| {name} | {workload} | {times} | {extra['speedup']:.2f}x | {' | '.join(memory)} | {rate} |")
    return "\n".join(rows)


def demo_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of demo summaries, with each method's medians."""
    rows = [DEMO_COLUMNS]
    for method in sorted({summary["method"] for summary in summaries}, reverse=True):
        mine = sorted((s for s in summaries if s["method"] == method), key=lambda s: s["seed"])
        for summary in mine:
            numbers = " | ".join(f"{summary[key]:.1f}" for key in MEDIANS)
            counts = f"{summary['prototypes_used']} | {summary['unique_prototypes']}"
            rows.append(f"| {method} | {summary['seed']} | {numbers} | {counts} |")
        medians = " | ".join(f"**{statistics.median(s[key] for s in mine):.1f}**" for key in MEDIANS)
        rows.append(f"| {method} | median | {medians} | | |")
    return "\n".join(rows)


def many_table(report: Mapping[str, Any]) -> str:
    """Markdown table of ``bench.many_prototypes``, and how far its ranks are from one alone."""
    what = f"{report['prototypes']:,} | {report['dim']} | {report['student_rows']}/{report['teacher_rows']}"
    memory = f"{report['logits_gib']:.0f} | {report['machine']['memory_gib']:.1f} |"
    rows = [f"| {report['ranks']} | {what} | {report['seconds']:.0f} | {max(report['peak_rss_mib'])} | {memory}"]
    alone = report.get("alone")
    if alone is None:
        return "\n".join([MANY_COLUMNS, *rows])
    rows.append(f"| 1 | {what} | {alone['seconds']:.0f} | {alone['peak_rss_mib']} | {memory}")
    worst = max(gradient["relative_difference"] for gradient in alone["gradients"].values())
    difference = f"loss {alone['loss_relative_difference']:.0e}, gradients at most {worst:.0e}"
    return "\n".join([MANY_COLUMNS, *rows, "", f"Relative difference between the two: {difference}."])


def shapes_table(report: Mapping[str, Any]) -> str:
    """Markdown table of ``bench.shapes``: medians in ms, and ours over the best of the losses without this library."""
    machine = report["machine"]
    bf16 = "has" if machine["bf16_products"] else "has no"
    title = f"{machine['cpu']}, {machine['instruction_set']} ({bf16} bf16 products), torch {machine['torch']}"
    rows = [title, "", SHAPE_COLUMNS]
    for row in report["rows"]:
        seconds = row["seconds"]
        ms = {name: f"{1e3 * statistics.median(times):.2f}" for name, times in seconds.items()}
        spread = f"{1e3 * min(seconds['auto']):.2f} to {1e3 * max(seconds['auto']):.2f}"
        others = " | ".join(
            ms.get(name, "") for name in ("native", "streaming", "published", "one_softmax", "compiled")
        )
        what = f"{row['pairing']} | {row['rows']} | {row['prototypes']:,} | {row['dim']} | {row['dtype']} | {row['threads']}"
        rows.append(f"| {what} | {ms['auto']} | {spread} | {others} | {over_the_best(row):.2f} | {bound_ms(row):.2f} |")
    return "\n".join(rows)


def first_call_table(results: Mapping[str, Any]) -> str:
    """Markdown table of a pytest-benchmark JSON of ``bench_first_call``: medians over processes."""
    rows = [FIRST_CALL_COLUMNS]
    for result in results["benchmarks"]:
        extra, options = result["extra_info"], result["params"]
        first = f"{1e3 * extra['first_seconds']:.0f} | {extra['first_mib']:.1f} | {extra['modules_loaded']:.0f}"
        later = f"{1e6 * extra['later_seconds']:.0f} | {1e6 * extra['least_seconds']:.0f} | {extra['wake_ups_per_call']:.1f}"
        rows.append(f"| {options['backend']} | {options['threads']} | {first} | {later} |")
    return "\n".join(rows)


def table(path: Path) -> str:
    """The table of a results file."""
    results = json.loads(path.read_text())
    if isinstance(results, dict) and "schema" in results:
        return gpu_table(results)
    if isinstance(results, dict) and results.get("kind") == "shapes":
        return shapes_table(results)
    if isinstance(results, dict) and "peak_rss_mib" in results:
        return many_table(results)
    if isinstance(results, list):
        return demo_table(results)
    first_call = "first_seconds" in results["benchmarks"][0]["extra_info"]
    return first_call_table(results) if first_call else head_table(results)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
