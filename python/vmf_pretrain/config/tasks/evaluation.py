"""Everything an evaluation depends on: a section for each task, under the task's name."""

from dataclasses import dataclass, field
from typing import Literal

from vmf_pretrain.config.tasks.attention import AttentionTask
from vmf_pretrain.config.tasks.copies import CopiesTask
from vmf_pretrain.config.tasks.data import DataTask
from vmf_pretrain.config.tasks.dense import DenseTask
from vmf_pretrain.config.tasks.features import FeaturesTask
from vmf_pretrain.config.tasks.few_shot import FewShotTask
from vmf_pretrain.config.tasks.finetune import FinetuneTask
from vmf_pretrain.config.tasks.knn import KnnTask
from vmf_pretrain.config.tasks.linear import LinearTask
from vmf_pretrain.config.tasks.neighbours import NeighboursTask
from vmf_pretrain.config.tasks.pca import PcaTask
from vmf_pretrain.config.tasks.prototypes import PrototypesTask
from vmf_pretrain.config.tasks.retrieval import RetrievalTask
from vmf_pretrain.config.tasks.transfer import TransferTask
from vmf_pretrain.config.tasks.video import VideoTask


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation. A new task is one more section here.

    Attributes:
        weights: of a run: "last", or "best" on the images that the run held out, which flatters it on those images.
        data: which images.
        features: how they are computed.
        knn: k-NN.
        linear: linear probes.
        few_shot: classification with few labelled images.
        transfer: logistic regression on other images.
        finetune: all weights trained on labelled images.
        retrieval: images that answer a query.
        copies: copies of images.
        video: objects followed through videos.
        dense: classes of pixels.
        attention: attention of the class token.
        pca: patches coloured by their principal components.
        prototypes: how images are assigned to them.
        neighbours: the nearest images of some, and near-duplicates.
    """

    weights: Literal["last", "best"] = "last"
    data: DataTask = field(default_factory=DataTask)
    features: FeaturesTask = field(default_factory=FeaturesTask)
    knn: KnnTask = field(default_factory=KnnTask)
    linear: LinearTask = field(default_factory=LinearTask)
    few_shot: FewShotTask = field(default_factory=FewShotTask)
    transfer: TransferTask = field(default_factory=TransferTask)
    finetune: FinetuneTask = field(default_factory=FinetuneTask)
    retrieval: RetrievalTask = field(default_factory=RetrievalTask)
    copies: CopiesTask = field(default_factory=CopiesTask)
    video: VideoTask = field(default_factory=VideoTask)
    dense: DenseTask = field(default_factory=DenseTask)
    attention: AttentionTask = field(default_factory=AttentionTask)
    pca: PcaTask = field(default_factory=PcaTask)
    prototypes: PrototypesTask = field(default_factory=PrototypesTask)
    neighbours: NeighboursTask = field(default_factory=NeighboursTask)


NO_TASKS = ("weights", "data", "features")  # the fields of EvaluationConfig that are no task
