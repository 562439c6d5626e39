"""Writing the shards of many ranks: torch's distributed checkpoint plans who writes what, our tensor files hold it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from vmf_pretrain.storage.shards import PLACES, flat_names
from vmf_pretrain.storage.tensor_file import write_tensors

METADATA = {"format": "pt", "DCP_VERSION": "1.0"}  # as torch's own writer says it


def write_shards(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], group: Any) -> dict[str, str]:
    """Write this rank's shards into ``folder``, which exists. All ranks of ``group`` call it.

    Args:
        folder: seen by all ranks.
        groups: by group, then by name: DTensors, or plain tensors that all ranks have alike.
        group: a process group with a CPU backend, that nothing else uses meanwhile.

    Returns:
        SHA-256 of this rank's files, which are on disk, by name.

    Raises:
        OSError: a rank could not write; raised on all ranks.
    """
    writer = ShardWriter(folder)
    try:
        save(dict(flat_names(groups)), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        reasons = [raised for raised, _ in error.failures.values()]
        others = [reason for reason in reasons if not isinstance(reason, OSError)]
        raise (others or reasons)[0] from error
    return writer.hashes


class ShardWriter(HuggingFaceStorageWriter):
    """torch's writer of shards, which writes the same file without stopping Python's other threads, and hashes it.

    Attributes:
        hashes: SHA-256 by file name, of what was written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.hashes: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what the plan gives this rank."""
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), f"{item.index.fqn} is no tensor"  # bytes would be a pickle
            assert item.tensor_data is not None, item
            tensors[item.index.fqn] = tensor
            places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            self.hashes[name] = write_tensors(self.folder / name, tensors, {**METADATA, PLACES: json.dumps(places)})
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # results would only become an index of files, which shards have none of
        return done
