"""What a run keeps on disk to go on from, and to load elsewhere."""

from dataclasses import asdict
from typing import Any

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.networks import ranks
from vmf_pretrain.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.weights import Weights, save_weights


class Keeping:
    """Checkpoints and weights of a run; every rank calls each method, and the first one writes."""

    def __init__(self, folder: RunFolder, config: Config, loop: Loop) -> None:
        self.folder, self.config, self.loop = folder, config, loop

    def checkpoint(self, step: int, facts: dict[str, Any]) -> None:
        """Write a checkpoint of this step."""
        tensors = self.loop.tensors()
        if ranks.rank() == 0:
            save_checkpoint(self.folder.checkpoints, step, tensors, facts, keep=self.config.train.keep_checkpoints)

    def newest(self) -> Checkpoint:
        """The newest checkpoint."""
        return load_checkpoint(self.folder.checkpoints)

    def weights(self, name: str, step: int, knn: float | None) -> None:
        """Write the exported module's weights."""
        if ranks.rank() == 0:
            facts = {"network": self.config.method, "step": step, "knn": knn, "config": asdict(self.config)}
            path, tensors = self.folder.weights / f"{name}.safetensors", self.loop.method.exported.state_dict()
            save_weights(Weights(path, tensors, network_input(self.config), facts))
