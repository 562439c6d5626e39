"""Several tasks on one network: features once for all, and what has finished is not run again."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.evaluation import EvaluationConfig
from vmf_pretrain.data.images import Images
from vmf_pretrain.evaluation.evaluated import Evaluated
from vmf_pretrain.evaluation.extract import Extraction, Wanted, images_facts
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import DTYPES, Kinds, require_kinds
from vmf_pretrain.evaluation.result import RESULT, Result, read_result, write_result
from vmf_pretrain.evaluation.stored import DIGITS, Features, fingerprint
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import View
from vmf_pretrain.networks import ranks
from vmf_pretrain.storage.lock import RunLock

P = ParamSpec("P")
T = TypeVar("T")

STORE = "features"  # folder of the features of all tasks
LIBRARIES = ("torch", "timm", "torchvision", "scikit-learn", "scipy", "numpy")


@dataclass(frozen=True)
class Hooks:
    """What a suite tells while it works.

    Attributes:
        say: takes a sentence.
        total: takes the number of images whose features are needed.
        advance: takes a number of images that are done.
        found: takes a task's name, its result, its folder, and whether it had finished before.
    """

    say: Callable[[str], None]
    total: Callable[[int], None]
    advance: Callable[[int], None]
    found: Callable[[str, Result, Path, bool], None]


@dataclass(frozen=True, eq=False)
class Planned:
    """A task that is to be run.

    Attributes:
        task: the task.
        settings: its section.
        images: that it reads, by name.
        wants: features, by the same names.
        depends: all that its result depends on, as JSON holds it.
        folder: of its result.
    """

    task: Task[Any]
    settings: Any
    images: Mapping[str, Images]
    wants: Mapping[str, Wanted]
    depends: Mapping[str, Any]
    folder: Path


class Suite:
    """Tasks on one network.

    Args:
        evaluated: the network.
        given: the images.
        config: settings of all tasks.
        out: folder of the evaluation; the first rank locks it while tasks run.
        hooks: who is told.
    """

    def __init__(self, evaluated: Evaluated, given: Given, config: EvaluationConfig, out: Path, hooks: Hooks) -> None:
        self.evaluated, self.given, self.config, self.out, self.hooks = evaluated, given, config, out, hooks
        self.failures: dict[str, str] = {}  # by task

    def run(self, tasks: Sequence[Task[Any]]) -> dict[str, Result]:
        """The results by task; a task that cannot be done is said, is in ``failures``, and stops no other one.

        Every rank must call it. All compute features; the first one does the tasks, and the others return nothing.
        """
        with contextlib.ExitStack() as closing:
            if ranks.rank() == 0:
                closing.enter_context(RunLock.take(self.out, say=self.hooks.say))
            planned = [plan for task in tasks if (plan := self._attempt(task, self._plan, task)) is not None]
            done = {plan.task.name: read_result(plan.folder) for plan in planned}
            unfinished = [name for name, result in done.items() if result is None]
            waiting = set(ranks.from_first(",".join(unfinished)).split(","))
            features = self._features([plan for plan in planned if plan.task.name in waiting])
            if ranks.rank():
                return {}
            return self._results(planned, done, features)

    def _results(
        self,
        planned: Sequence[Planned],
        done: Mapping[str, Result | None],
        features: Mapping[str, Mapping[str, Features]],
    ) -> dict[str, Result]:
        results: dict[str, Result] = {}
        for plan in planned:
            name, before = plan.task.name, done[plan.task.name]
            made = before
            if before is None and name in features:
                made = self._attempt(plan.task, self._work, plan, features[name])
            if made is not None:
                results[name] = made
                self.hooks.found(name, made, plan.folder, before is not None)
        return results

    def _attempt(self, task: Task[Any], work: Callable[P, T], *given: P.args, **options: P.kwargs) -> T | None:
        """What ``work`` returns; None after a failure that a person can mend."""
        try:
            return work(*given, **options)
        except PretrainError as error:
            self.failures[task.name] = str(error)
            self.hooks.say(f"{task.name}: {error}")
            return None

    def _plan(self, task: Task[Any]) -> Planned:
        settings = getattr(self.config, task.name)
        images, wants = task.images(self.given, settings), task.wants(settings, self.evaluated.fed)
        for wanted in wants.values():  # before they are joined with those of other tasks, which would fail too
            require_kinds(self.evaluated.network, wanted.kinds)
        depends = {
            "task": task.name,
            "version": task.version,
            "weights": self.evaluated.fingerprint,
            "input": self.evaluated.fed.facts(),
            "images": {name: images_facts(some) for name, some in images.items()},
            "settings": asdict(settings),
            "dtype": self.config.features.dtype,
            "depends": {**task.depends(self.given, settings), **task.depends_on_run(self.evaluated)},
        }
        folder = self.out / f"{task.name}-{fingerprint(depends)[:DIGITS]}"
        return Planned(task, settings, images, wants, depends, folder)

    def _features(self, planned: Sequence[Planned]) -> dict[str, dict[str, Features]]:
        """Features by task and name, each set of images shown in one way once; a task without its features is left out."""
        kinds: dict[tuple[str, View], Kinds] = {}
        counts: dict[tuple[str, View], int] = {}
        for plan in planned:
            for name, wanted in plan.wants.items():
                key = _key(plan, name)
                kinds[key] = kinds.get(key, wanted.kinds) | wanted.kinds
                counts[key] = len(plan.images[name])
        self.hooks.total(sum(counts.values()))
        extraction = Extraction(self.evaluated, self.config.features, self.out / STORE, self.hooks.advance)
        found: dict[tuple[str, View], Features] = {}

        def extract(plan: Planned) -> dict[str, Features]:
            for name, wanted in plan.wants.items():
                key = _key(plan, name)
                if key not in found:
                    found[key] = extraction.features(plan.images[name], Wanted(wanted.view, kinds[key]))
            return {name: found[_key(plan, name)] for name in plan.wants}

        extracted = {plan.task.name: self._attempt(plan.task, extract, plan) for plan in planned}
        return {name: features for name, features in extracted.items() if features is not None}

    def _work(self, plan: Planned, features: Mapping[str, Features]) -> Result:
        plan.folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        dtype = DTYPES[self.config.features.dtype]
        subject = Subject(self.evaluated, self.given, plan.images, features, plan.folder, dtype)
        result = plan.task.run(subject, plan.settings)
        bad = {name: dict(some.bad) for name, some in features.items() if some.bad}
        about = {
            **plan.depends,
            "evaluated": dict(self.evaluated.facts),
            "data": asdict(self.config.data),
            "features": asdict(self.config.features),
            "bad_images": bad,
            "seconds": round(time.perf_counter() - began, 3),
            "versions": {name: version(name) for name in LIBRARIES},
        }
        if bad:
            self.hooks.say(f"{plan.task.name}: {_bad_text(bad)}; {plan.folder / RESULT} names them.")
        try:
            write_result(plan.folder, result, about)
        except OSError as error:
            reason = f"{plan.folder} could not be written: {error.strerror or error}; the figures stand here only."
            self.failures[plan.task.name] = reason  # whoever reads the exit code looks for the file
            self.hooks.say(reason)
        return result


def _key(plan: Planned, name: str) -> tuple[str, View]:
    """What features depend on, beside the network and their kinds."""
    return fingerprint(plan.depends["images"][name]), plan.wants[name].view


def _bad_text(bad: Mapping[str, Mapping[str, str]]) -> str:
    counts = ", ".join(f"{len(some)} of {name}" for name, some in bad.items())
    return f"images could not be read and are not evaluated: {counts}"
