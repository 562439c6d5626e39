"""The sub-command ``vmf-pretrain eval``."""

import argparse
from pathlib import Path
from typing import Any

from vmf_pretrain.config.file import options_layer
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.tasks.evaluation import EvaluationConfig
from vmf_pretrain.start_evaluation import Question, answered, chosen_tasks, settings_of, task_names

NAME = "eval"


def add_evaluation(commands: Any) -> None:
    """Add the sub-command's options to argparse's sub-commands."""
    epilog = "any setting is an option: --knn.neighbours '[10, 20]', --features.dtype bfloat16, --data.max_images 5000"
    command = commands.add_parser(NAME, help="evaluate frozen features", epilog=epilog, allow_abbrev=False)
    command.add_argument(
        "network", metavar="RUN|FILE|timm:NAME", help="folder of a run, file of weights, or network of timm"
    )
    command.add_argument("--task", required=True, help=f"some of {', '.join(task_names())}, with commas")
    command.add_argument(
        "--data", metavar="FOLDER", help="images; sub-folders are classes (default: those of the run, with its split)"
    )
    command.add_argument("--out", type=Path, help="folder of the results (default: RUN/evaluation, or one below runs)")
    command.add_argument("--weights", help="last or best of a run (default: last)")
    command.add_argument("--allow-code", action="store_true", help="let the settings of a run name modules to import")
    command.add_argument("--print-config", action="store_true", help="print all settings as YAML, and end")


def question_of(chosen: argparse.Namespace) -> Question:
    """What the command line asks for.

    Raises:
        PretrainError: a task or a setting is unknown, or a value does not fit.
    """
    short = {"data.folder": chosen.data, "weights": chosen.weights}
    config = settings_of(options_layer(short, chosen.fields, EvaluationConfig))
    out = None if chosen.out is None else expanded(chosen.out, "--out")
    return Question(chosen.network, chosen_tasks(chosen.task), config, out, chosen.allow_code)


def run_evaluation(question: Question) -> bool:
    """Do it, on standard output; whether every task was done."""
    from vmf_pretrain.report.console import run_console

    return not answered(question, run_console()).failures
