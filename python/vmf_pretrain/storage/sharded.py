"""Checkpoints of a run whose ranks each hold a share of every tensor (FSDP2): all ranks save, and any number of ranks loads.

The folder, its manifest and its promises are those of ``checkpoint.py``. Either kind loads into a run of the other kind.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.checkpoint import (
    Checkpoint,
    Groups,
    check_arguments,
    not_written,
    outline_checkpoint,
    outline_of,
    require_same_tensors,
)
from vmf_pretrain.storage.durable import remove
from vmf_pretrain.storage.manifest import SHARDED, DamagedError, Manifest, write_manifest
from vmf_pretrain.storage.shard_writer import write_shards
from vmf_pretrain.storage.shards import fill_from_shards
from vmf_pretrain.storage.step_folders import TEMPORARY, clear_up, folder_of, put_in_place, remove_older
from vmf_pretrain.storage.tensor_file import read_tensors

T = TypeVar("T")


def save_sharded(folder: Path, step: int, tensors: Groups, state: Mapping[str, Any], *, keep: int, group: Any) -> Path:
    """As ``save_checkpoint``, by all ranks of ``group`` together; rank 0 puts the checkpoint in place after all have written.

    Args:
        folder: on a disk that all ranks share.
        step: as in ``save_checkpoint``, the same on all ranks.
        tensors: DTensors, of which each rank writes its share, or tensors that all ranks have alike, of which one writes each.
        state: that of rank 0 is written.
        keep: as in ``save_checkpoint``.
        group: a gloo group of its own, since this may run beside the training step (``CheckpointWriter``).

    Raises:
        PretrainError: a rank could not write; raised on all ranks, and earlier checkpoints and ``LATEST`` are unchanged.
        ValueError: as in ``save_checkpoint``.
    """
    check_arguments(step, tensors, keep)
    path = folder_of(folder, step)
    unfinished = folder / f"{TEMPORARY}{path.name}"
    first = distributed.get_rank(group) == 0

    def begin() -> None:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            clear_up(folder)
            unfinished.mkdir()

    def finish() -> None:
        if first:
            write_manifest(unfinished, Manifest(step, SHARDED, list(tensors), hashes, dict(state)))
            put_in_place(unfinished, path)

    try:
        _together(group, begin)
        written = _together(group, lambda: write_shards(unfinished, tensors, group))
        hashes = {name: sha256 for of_rank in written for name, sha256 in of_rank.items()}
        _together(group, finish)
    except OSError as error:
        raise PretrainError(not_written(path, error)) from error
    finally:
        if first:
            remove(unfinished)
    if first:
        remove_older(folder, step, keep)
    return path


def find_checkpoint(folder: Path, group: Any) -> Checkpoint:
    """The newest checkpoint that verifies, the same on all ranks of ``group``; its tensors are on the meta device.

    Raises:
        PretrainError: as ``load_checkpoint``, on all ranks.
    """

    def search() -> str | None:
        return outline_checkpoint(folder).path.name if distributed.get_rank(group) == 0 else None

    name = _together(group, search)[0]
    assert name is not None
    try:
        return outline_of(folder / name)
    except DamagedError as damage:
        raise PretrainError(
            f"{folder / name} is whole on rank 0 but not here: {damage}; do all ranks see it?"
        ) from None


def load_into(found: Checkpoint, targets: Groups) -> None:
    """Fill tensors in place from a checkpoint of either kind. Each rank reads alone, and only what it needs of shards.

    Args:
        found: from ``find_checkpoint`` or ``outline_checkpoint``.
        targets: by group, then by name: DTensors, or plain tensors that get the whole.

    Raises:
        PretrainError: names, shapes or dtypes differ (the error lists them), or a file cannot be read.
    """
    for group, named in targets.items():
        require_same_tensors(group, found.tensors.get(group, {}), named)
    if found.layout == SHARDED:
        fill_from_shards(found.path, {group: named for group, named in targets.items() if named})
        return
    for group, named in targets.items():
        whole = read_tensors(found.path / f"{group}.safetensors")[0]
        for name, target in named.items():
            _fill(target, whole[name])


def _fill(target: Tensor, whole: Tensor) -> None:
    target = target.detach()
    if isinstance(target, DTensor):
        # src_data_rank=None: every rank cuts its share from its own copy, instead of waiting for rank 0's
        share = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(share.to_local())
    else:
        target.copy_(whole)


def _together(group: Any, act: Callable[[], T]) -> list[T]:
    """Call ``act`` on every rank; returns what each rank's call returned.

    Raises:
        OSError: a rank raised it; raised on all ranks.
        PretrainError: likewise.
    """
    result: T | None = None
    fault: tuple[type[OSError] | type[PretrainError], tuple[Any, ...]] | None = None
    try:
        result = act()
    except OSError as error:
        fault = (OSError, (error.errno, error.strerror or str(error)))
    except (PretrainError, DamagedError) as error:
        fault = (PretrainError, (str(error),))
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, (result, fault), group=group)
    for _, found in gathered:
        if found is not None:
            kind, arguments = found
            raise kind(*arguments)
    return [returned for returned, _ in gathered]
