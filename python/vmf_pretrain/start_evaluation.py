"""From what a person asked for to an evaluation: the network, the images, the folder, and the ranks that take part.

The command and the Python call are two doors to this. Nothing here imports torch before the settings are known to be good.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import python_layer
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.tasks.evaluation import NO_TASKS, EvaluationConfig
from vmf_pretrain.config.typed import made, names_of
from vmf_pretrain.launch import rank

if TYPE_CHECKING:
    from rich.console import Console

    from vmf_pretrain.evaluation.result import Result

FOLDER = "evaluation"  # of a run, and the start of other names below runs/


@dataclass(frozen=True)
class Question:
    """What a person asked for.

    Attributes:
        network: the folder of a run, a file of weights, or ``timm:NAME``.
        tasks: their names.
        config: settings of all tasks.
        out: folder of the results; None takes ``evaluation`` in the run's folder, or one below ``runs``.
        allow_code: whether the settings of a run may name modules to import.
    """

    network: str
    tasks: Sequence[str]
    config: EvaluationConfig
    out: Path | None = None
    allow_code: bool = False


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found.

    Attributes:
        folder: of the results.
        results: by task: those of this call and those that had finished before, on the first rank.
        failures: by task, why it could not be done.
    """

    folder: Path
    results: "Mapping[str, Result]"
    failures: Mapping[str, str]


def task_names() -> list[str]:
    """The names of the tasks, read without torch."""
    return [
        name
        for name in dict.fromkeys(name.split(".")[0] for name in names_of(EvaluationConfig))
        if name not in NO_TASKS
    ]


def chosen_tasks(text: str) -> list[str]:
    """Names of tasks from a list with commas.

    Raises:
        PretrainError: one is unknown, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in task_names()]
    if unknown or not names:
        given = f"there is no task {unknown[0]}" if unknown else "no task is given"
        raise PretrainError(f"{given}; expected some of {', '.join(task_names())}, with commas.")
    return names


def settings_of(layer: Mapping[str, Any]) -> EvaluationConfig:
    """The settings of an evaluation.

    Raises:
        PretrainError: a value is out of range, or a share is to be held out of the images of a run, which have its split.
    """
    data = layer.get("data", {})
    if "held_out" in data and data.get("folder") is None:
        raise PretrainError(
            f"data.held_out is {data['held_out']}, but without --data the images are those of the run, with its split; "
            "expected --data FOLDER beside it."
        )
    config: EvaluationConfig = made(EvaluationConfig, layer)
    return config


def evaluate(
    network: str | os.PathLike[str],
    *,
    tasks: str | Sequence[str],
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    allow_code: bool = False,
    quiet: bool = False,
    **fields: Any,
) -> Answer:
    """Evaluate frozen features, as ``vmf-pretrain eval`` does.

    Args:
        network: the folder of a run, a file of weights, ``timm:NAME``, or ``timm:NAME=FILE``.
        tasks: names of tasks, as a list or with commas.
        data: images; None takes those of the run, with its split.
        out: folder of the results; None takes ``evaluation`` in the run's folder, or one below ``runs``.
        allow_code: whether the settings of a run may name modules to import.
        quiet: print nothing.
        fields: other settings, as sections (``knn={"neighbours": [20]}``) or ``**{"knn.neighbours": [20]}``.

    Returns:
        The folder and the results.

    Raises:
        PretrainError: network, data or settings do not fit, or a task cannot be done: one sentence that says what to do. What
            the other tasks found is on disk then, and is not computed again.
    """
    from vmf_pretrain.report.console import run_console

    short = {} if data is None else {"data.folder": os.fspath(data)}
    config = settings_of(python_layer({**short, **fields}, EvaluationConfig))
    names = chosen_tasks(tasks if isinstance(tasks, str) else ",".join(tasks))
    folder = None if out is None else expanded(os.fspath(out), "out")
    answer = answered(Question(os.fspath(network), names, config, folder, allow_code), run_console(quiet=quiet))
    if answer.failures:
        name, reason = next(iter(answer.failures.items()))
        raise PretrainError(f"{name}: {reason}")
    return answer


def answered(question: Question, console: "Console") -> Answer:
    """Do the tasks, with the other ranks of torchrun or srun, if there are any.

    Raises:
        PretrainError: the network or the folder do not fit. A task that cannot be done is said, and is in ``failures``.
    """
    from rich.console import Console

    from vmf_pretrain.engine.parallel import choose_device, process_group
    from vmf_pretrain.evaluation.evaluated import load_evaluated
    from vmf_pretrain.evaluation.given import Given
    from vmf_pretrain.evaluation.suite import Hooks, Suite
    from vmf_pretrain.evaluation.tasks.table import TASKS
    from vmf_pretrain.report.results import features_progress, print_result

    config, device = question.config, question.config.features.device
    shown = console if rank() == 0 else Console(quiet=True)
    with process_group(device), features_progress(shown) as progress:
        evaluated = load_evaluated(
            question.network,
            device=choose_device(device),
            weights=config.weights,
            size=config.features.size,
            allow_code=question.allow_code,
        )
        folder = question.out or _folder_of(question.network, None if evaluated.run is None else evaluated.run.path)
        shown.print(f"Evaluating {evaluated.name}.", markup=False, highlight=False, soft_wrap=True)
        bar = progress.add_task("", total=None)
        hooks = Hooks(
            say=lambda text: shown.print(text, markup=False, highlight=False, soft_wrap=True),
            total=lambda count: progress.update(bar, total=count),
            advance=lambda count: progress.advance(bar, count),
            found=lambda name, result, where, before: print_result(shown, name, result, str(where), before=before),
        )
        given = Given(config.data, evaluated.config, evaluated.fed.size, allow_code=question.allow_code)
        suite = Suite(evaluated, given, config, folder, hooks)
        results = suite.run([TASKS[name] for name in question.tasks])
        return Answer(folder, results, suite.failures)


def _folder_of(network: str, run: Path | None) -> Path:
    """The folder of the results where none was given: always the same one, so that finished tasks are found."""
    if run is not None:
        return run / FOLDER
    return Path("runs") / f"{FOLDER}-{re.sub(r'[^A-Za-z0-9._-]+', '-', network).strip('-.')}"
