"""What every method of the trainer learns from the bundled images, and what the normaliser does to the prototypes.

python -m bench.pretrain_methods --out runs/methods --json bench/results/cpu/pretrain_methods.json
python -m bench.pretrain_methods --norms --out runs/norms --json bench/results/cpu/pretrain_norms.json --plot docs/norms.png
python -m bench.pretrain_methods --out runs/try --json try.json --data digits --methods mae --set optim.clip=1

Each run has a process and a thread of its own, two at a time. A run whose summary.json is in its folder is not run again; one
that was interrupted goes on. So the same command continues, and at the end of all it only writes the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vmf_bench.json_text import json_text
from vmf_pretrain.call import pretrain
from vmf_pretrain.config.data import BUNDLED
from vmf_pretrain.config.file import python_layer, read_config, text_layer
from vmf_pretrain.config.resume import flat
from vmf_pretrain.recipes.table import bundled_recipe
from vmf_pretrain.start import Wish, settings
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

SEEDS = (0, 1, 2)
AT_ONCE = 2
PACKAGES = ("scikit-learn", "timm", "torchvision")
LAST = 10  # logged steps whose mean is a run's figure: a batch differs from the next
CURVE = 60  # points of a curve over a run, at most
# what a method's own figures are called in metrics.jsonl; those that a method does not log are left out
OWN = (
    "masked_patch_accuracy",
    "patch_mutual_information",
    "relative_loss",
    "mean_patch_loss",
    "constant_loss",
    "target_variance",
    "image_variance",
)
NORMS = ("least_norm", "median_norm", "largest_norm")
METHODS = ("dino", "dino-vmf", "ibot", "ibot-vmf", "dinov2", "mae", "ijepa")
PROTOTYPES = (256, 65536)
VARIANTS: dict[str, dict[str, Any]] = {
    "dino": {"method": "dino"},
    "dino-vmf": {"method": "dino-vmf"},
    "free norms": {"method": "dino", "head.norm_prototypes": False},
}


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        data: which bundled images; also the recipe's name.
        name: of the method, or of the variant of DINO.
        seed: of the run.
        fields: settings on top of the recipe's, by dotted name.
    """

    data: str
    name: str
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        prototypes = f"-{self.fields['head.prototypes']}" if "head.prototypes" in self.fields else ""
        return f"{self.data}-{self.name.replace(' ', '-')}{prototypes}-{self.seed}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``pretrain`` for a new run."""
        return {"recipe": bundled_recipe(self.data, self.name), "method": self.name, "seed": self.seed, **self.fields}


def methods_plan(
    data: Sequence[str], methods: Sequence[str], seeds: Sequence[int], more: Mapping[str, Any]
) -> list[Planned]:
    """Every method on all images with each seed; the first seed of all comes first."""
    return [Planned(images, method, seed, more) for seed in seeds for images in data for method in methods]


def norms_plan(
    data: Sequence[str], prototypes: Sequence[int], seeds: Sequence[int], more: Mapping[str, Any]
) -> list[Planned]:
    """The variants of DINO with few and with many prototypes."""
    return [
        Planned(images, name, seed, {**fields, **more, "head.prototypes": count})
        for seed in seeds
        for images in data
        for count in prototypes
        for name, fields in VARIANTS.items()
    ]


def run_here(planned: Planned, out: Path) -> None:
    """Train in this process, or go on with the run in ``out``."""
    if (out / "config.yaml").is_file():
        pretrain(out=out, resume=True, quiet=True)
    else:
        pretrain(out=out, quiet=True, **planned.arguments)


def run_in_a_process(planned: Planned, out: Path) -> None:
    """The same in a process of its own, with one thread.

    Raises:
        RuntimeError: it failed; what it printed last is in the message.
    """
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    one = json.dumps({**asdict(planned), "out": str(out)})
    command = [sys.executable, "-m", "bench.pretrain_methods", "--one", one]
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{planned.folder} ended with {done.returncode}: {done.stderr.strip()[-800:]}")


def finished(planned: Planned, out: Path) -> bool:
    """Whether the run in ``out`` is done.

    Raises:
        SystemExit: its settings are not those planned.
    """
    if (out / "config.yaml").is_file():
        fields = {name: value for name, value in planned.arguments.items() if name != "recipe"}
        asked = settings(Wish(planned.arguments["recipe"], fields=python_layer(fields)), print)
        if read_config(out / "config.yaml") != asked:
            raise SystemExit(
                f"{out} is a run with other settings than are planned now; move it away, or give another --out."
            )
    return (out / "summary.json").is_file()


def run_all(plan: Sequence[Planned], folder: Path, start: Callable[[Planned, Path], None], at_once: int) -> list[str]:
    """Run what is not done yet; returns what failed, a sentence each."""
    left = [planned for planned in plan if not finished(planned, folder / planned.folder)]
    print(f"{len(plan) - len(left)} of {len(plan)} runs are done.", flush=True)

    def run(planned: Planned) -> str | None:
        try:
            start(planned, folder / planned.folder)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            return str(error)
        print(f"{planned.folder} is done.", flush=True)
        return None

    with ThreadPoolExecutor(at_once) as threads:
        return [failure for failure in threads.map(run, left) if failure is not None]


def figures_of(planned: Planned, out: Path) -> dict[str, Any]:
    """Every figure of a finished run: its summary, its method's own figures, and the norms of its prototypes over time."""
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    logged = [record for record in read_metrics(RunFolder(out)) if "loss" in record]
    prototypes = read_config(out / "config.yaml").head.prototypes
    return {
        "data": planned.data,
        "name": planned.name,
        "prototypes": prototypes if summary["mutual_information"] is not None else None,
        **summary,
        "own": dict(_own_figures(logged)),
        "norms": [
            [record["step"], *(record[name] for name in NORMS)] for record in _thinned(logged) if NORMS[0] in record
        ],
    }


def _own_figures(logged: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Means over the last logged steps."""
    for name in OWN:
        values = [record[name] for record in logged[-LAST:] if record.get(name) is not None]
        if values:
            yield name, statistics.mean(values)


def _thinned(logged: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """At most CURVE records, evenly spread, with the last one."""
    every = -(-len(logged) // CURVE) if logged else 1
    return logged[::-1][::every][::-1]


def report(plan: Sequence[Planned], folder: Path) -> dict[str, Any]:
    """What was measured, on what, with which settings; runs that are not done are left out."""
    from vmf_bench.machine import machine  # here, as it imports torch: a wrong setting is answered before that

    done = [planned for planned in plan if (folder / planned.folder / "summary.json").is_file()]
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {one.folder: dict(one.fields) for one in plan},
        "planned": len(plan),
        "runs": [figures_of(planned, folder / planned.folder) for planned in done],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--norms", action="store_true", help="compare variants of DINO with few and many prototypes")
    parser.add_argument("--plot", type=Path, help="with --norms: PNG of the norms over time")
    parser.add_argument("--data", nargs="+", choices=BUNDLED)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="runs at the same time")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of all runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is None and (options.out is None or options.json is None):
        parser.error("--out and --json are needed")
    if options.norms and len(options.data or ()) > 1:
        parser.error("--norms compares variants on one kind of images; give one with --data")
    return options


def main() -> None:
    options = _options()
    if options.one is not None:
        one = json.loads(options.one)
        out = Path(one.pop("out"))
        run_here(Planned(**one), out)
        return
    more = flat(text_layer(dict(word.split("=", 1) for word in options.set)))
    if options.norms:
        plan = norms_plan(options.data or BUNDLED[:1], PROTOTYPES, options.seeds, more)
    else:
        plan = methods_plan(options.data or BUNDLED, options.methods, options.seeds, more)
    failures = run_all(plan, options.out, run_in_a_process, options.at_once)
    found = report(plan, options.out)
    options.json.write_text(json_text(found, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        from bench.pretrain_plot import plot_norms

        plot_norms(found, options.plot)
    raise SystemExit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
