"""The tasks by name, in the order in which their results are shown."""

from typing import Any

from vmf_pretrain.evaluation.task import Task
from vmf_pretrain.evaluation.tasks.knn import Knn

TASKS: dict[str, Task[Any]] = {task.name: task for task in (Knn(),)}
