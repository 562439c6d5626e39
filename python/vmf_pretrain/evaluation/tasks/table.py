"""The tasks by name, in the order in which their results are shown."""

from typing import Any

from vmf_pretrain.evaluation.task import Task
from vmf_pretrain.evaluation.tasks.attention import Attention
from vmf_pretrain.evaluation.tasks.copies import Copies
from vmf_pretrain.evaluation.tasks.dense import Dense
from vmf_pretrain.evaluation.tasks.few_shot import FewShot
from vmf_pretrain.evaluation.tasks.finetune import Finetune
from vmf_pretrain.evaluation.tasks.knn import Knn
from vmf_pretrain.evaluation.tasks.linear import Linear
from vmf_pretrain.evaluation.tasks.neighbours import Neighbours
from vmf_pretrain.evaluation.tasks.pca import Pca
from vmf_pretrain.evaluation.tasks.prototypes import PrototypesOfRun
from vmf_pretrain.evaluation.tasks.retrieval import Retrieval
from vmf_pretrain.evaluation.tasks.transfer import Transfer
from vmf_pretrain.evaluation.tasks.video import VideoObjects

TASKS: dict[str, Task[Any]] = {
    task.name: task
    for task in (
        Knn(),
        Linear(),
        FewShot(),
        Transfer(),
        Finetune(),
        Retrieval(),
        Copies(),
        VideoObjects(),
        Dense(),
        Attention(),
        Pca(),
        PrototypesOfRun(),
        Neighbours(),
    )
}
