"""Tables of the READMEs from committed results.

python -m bench.report bench/results/cpu/head.json             prints one
python -m bench.report bench/results/<name of a GPU>/head.json with the ratios and whether each target was met
python -m bench.report --write                                 puts all of results/cpu/ where the pages name them
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.tables import gpu_table
from bench.head_picture import groups_of, picture
from bench.pretrain_tables import methods_table, norms_table, tasks_table
from bench.shapes import bound_ms, over_the_best
from vmf_bench.table import case_table, heading

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "docs" / "losses.md")
PICTURE = ROOT / "docs" / "head.svg"
TABLE = re.compile(r"(<!-- table ([\w-]+) -->)\n.*?(<!-- /table -->)", re.DOTALL)

HEAD_COLUMNS = (
    "| step | rows | published ms | one log-softmax ms | published, compiled ms | ours ms | over published | over the best "
    "| extra MiB: published | ours | rate / torch.mm |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
OWN_COLUMNS = "| step | rows | plain DINO ms | ms | over plain |\n|---|---|---|---|---|"
RIVALS = ("published", "one log-softmax", "published, compiled")
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
KOLEO_COLUMNS = "| step | prototypes | seconds | extra MiB | unique |\n|---|---|---|---|---|"
VIT_COLUMNS = (
    "| head and loss | images/s | backbone s | head and loss s | update s | share of head and loss | peak MiB |\n"
    "|---|---|---|---|---|---|---|"
)
LOOP_PARTS = ("images", "forward s", "backward s", "update s", "the rest s", "share of the rest", "peak extra MiB")
LOOP_COLUMNS = f"| {' | '.join(LOOP_PARTS)} |\n{'|---' * len(LOOP_PARTS)}|"
MANY_COLUMNS = (
    "| ranks | prototypes | dim | rows | seconds | peak MiB of a rank | one copy of the logits GiB | machine's memory GiB |\n"
    "|---|---|---|---|---|---|---|---|"
)
SHAPE_COLUMNS = (
    "| pairs | rows | prototypes | dim | dtype | threads | ours ms | spread | native | streaming | published | one softmax "
    "| compiled | over the best | products at torch.mm's rate |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)
ACCURACIES = ("knn", "knn_untrained", "knn_pixels", "linear", "linear_untrained", "linear_pixels")
MEDIANS = (*ACCURACIES, "mutual_information", "rankme")


def head_table(results: Mapping[str, Any]) -> str:
    """Markdown tables of a pytest-benchmark JSON of ``bench_head``: against the rivals' losses, and of our own options."""
    rows, own = [HEAD_COLUMNS], [OWN_COLUMNS]
    for result in results["benchmarks"]:
        options = result["name"].split("[")[1].rstrip("]").split("-")
        step = result["name"].split("[")[0].removeprefix("test_").replace("_", " ")
        name = " ".join([step, *(option for option in options if not option.isdigit())])
        workload = "/".join(option for option in options if option.isdigit())
        medians, ours = result["extra_info"]["rival_medians"], result["stats"]["median"]
        if "plain DINO" in medians:
            plain = medians["plain DINO"]
            own.append(f"| {name} | {workload} | {1e3 * plain:.0f} | {1e3 * ours:.0f} | {ours / plain - 1:+.0%} |")
        else:
            rows.append(f"| {name} | {workload} | {head_row(result['extra_info'], ours)} |")
    return "\n".join(rows) + "\n\n" + "\n".join(own)


def head_row(extra: Mapping[str, Any], ours: float) -> str:
    """Columns of a row against the rivals' losses; above 1 ours is faster."""
    medians, memory = extra["rival_medians"], extra.get("extra_mib", {})
    times = [f"{1e3 * medians[name]:.0f}" for name in RIVALS] + [f"{1e3 * ours:.0f}"]
    ratios = [f"{medians['published'] / ours:.2f}x", f"{min(medians.values()) / ours:.2f}x"]
    sizes = [f"{memory[name]:.0f}" if name in memory else "" for name in ("published", "ours")]
    rate = f"{extra['rate_over_mm']:.2f}" if "rate_over_mm" in extra else ""
    return " | ".join([*times, *ratios, *sizes, rate])


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
    family, sets = machine["cpu_family_and_model"], ", ".join(machine["instruction_sets"])
    title = f"{machine['cpu']} (family/model {family}; {sets}), torch {machine['torch']}"
    rows = [title, "", SHAPE_COLUMNS]
    for row in report["rows"]:
        seconds = row["seconds"]
        ms = {name: f"{1e3 * statistics.median(times):.2f}" for name, times in seconds.items()}
        spread = f"{1e3 * min(seconds['auto']):.2f} to {1e3 * max(seconds['auto']):.2f}"
        others = " | ".join(
            ms.get(name, "") for name in ("native", "streaming", "published", "one_softmax", "compiled")
        )
        what = f"{row['pairing']} | {row['rows']} | {row['prototypes']:,} | {row['dim']} | {row['dtype']} | {row['threads']}"
        rows.append(
            f"| {what} | {ms['auto']} | {spread} | {others} | {over_the_best(row):.2f}x | {bound_ms(row):.2f} |"
        )
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


def koleo_table(results: Mapping[str, Any]) -> str:
    """Markdown table of a pytest-benchmark JSON of ``bench_koleo``."""
    rows = [KOLEO_COLUMNS]
    for result in results["benchmarks"]:
        step, prototypes = result["name"].removeprefix("test_").rstrip("]").split("[")
        extra, seconds = result["extra_info"], result["stats"]["median"]
        found = f"{extra['unique']:,}" if "unique" in extra else ""
        rows.append(f"| {step.replace('_', ' ')} | {prototypes} | {seconds:.1f} | {extra['extra_mib']:.0f} | {found} |")
    return "\n".join(rows)


def vit_table(results: Mapping[str, Any]) -> str:
    """Markdown table of ``bench.vit_step``."""
    rows = [VIT_COLUMNS]
    for row in results["rows"]:
        times = " | ".join(f"{row['phases'][phase]:.2f}" for phase in ("backbone", "head and loss", "update"))
        share = f"{100 * row['head_share']:.0f} %"
        rows.append(
            f"| {row['variant']} | {row['images_per_second']:.2f} | {times} | {share} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(rows)


def loop_table(results: Mapping[str, Any]) -> str:
    """Markdown table of ``bench.trainer_loop``, and what a second rank gained."""
    step, ranks = results["step"], results["ranks"]
    seconds = step["seconds"]
    times = " | ".join(f"{seconds[part]:.2f}" for part in ("forward", "backward", "update"))
    rest = f"{seconds['the rest']:.3f} | {100 * step['share']:.2f} %"
    rates = " and ".join(f"{one:.1f} / {two:.1f}" for one, two in zip(ranks["1"], ranks["2"], strict=True))
    rows = [_part(results["machine"]), "", LOOP_COLUMNS]
    rows.append(f"| {step['images']} | {times} | {rest} | {step['peak_extra_mib']:.0f} |")
    gain = f"Images a second on one rank / on two, a thread each: {rates}; medians {results['gain']:.2f}x."
    return "\n".join([*rows, "", gain])


def _part(machine: Mapping[str, Any]) -> str:
    """The machine of a table."""
    sets = ", ".join(machine["instruction_sets"])
    name = f"{machine['cpu']} (family/model {machine['cpu_family_and_model']}; {sets})"
    return f"{name}, {machine['cores']} cores, torch {machine['torch']}"


def session_table(results: Mapping[str, Any]) -> str:
    """The machine and the first case of a run of ``vmf-bench``."""
    return f"```text\n{heading(results)}\n\n{case_table(results['cases'][0])}\n```"


OF_FILE: dict[str, Callable[[Any], str]] = {
    "head": head_table,
    "first_call": first_call_table,
    "demo": demo_table,
    "koleo": koleo_table,
    "many_prototypes": many_table,
    "pretrain_methods": methods_table,
    "pretrain_norms": norms_table,
    "pretrain_tasks": tasks_table,
    "shapes": shapes_table,
    "shapes_avx512": shapes_table,
    "trainer_loop": loop_table,
    "vit_step": vit_table,
    "vmf-bench": session_table,
}


def table(path: Path) -> str:
    """The table of a results file; which it is, its name says.

    Raises:
        SystemExit: there is no such table.
    """
    results = json.loads(path.read_text())
    if isinstance(results, dict) and "dry_run" in results:
        return gpu_table(results)
    if path.stem not in OF_FILE:
        raise SystemExit(f"{path} is none of the results with a table: {', '.join(OF_FILE)}")
    return OF_FILE[path.stem](results)


def with_tables(page: str, folder: Path = RESULTS) -> str:
    """A page with each table between ``<!-- table NAME -->`` and ``<!-- /table -->`` as NAME.json of the folder has it.

    Raises:
        FileNotFoundError: a page names results that are not there.
    """
    return TABLE.sub(lambda found: f"{found[1]}\n{table(folder / f'{found[2]}.json')}\n{found[3]}", page)


def head_picture() -> str:
    """The README's picture, of the committed results."""
    return picture(groups_of(json.loads((RESULTS / "head.json").read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="a file, whose table is printed")
    parser.add_argument("--write", action="store_true", help="put all tables into the pages")
    options = parser.parse_args()
    if options.write == (options.results is not None):
        parser.error("give a file of results, or --write")
    if options.results is not None:
        print(table(options.results))
    for page in PAGES if options.write else ():
        page.write_text(with_tables(page.read_text()))
    if options.write:
        PICTURE.write_text(head_picture())


if __name__ == "__main__":
    main()
