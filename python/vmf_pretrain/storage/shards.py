"""Reading the files that many ranks wrote together: torch's distributed checkpoint in its safetensors form.

Each rank writes its shards into a file of its own, whose header says where in the whole tensor each shard belongs. A tensor of
group "student" is called "student/<name>". There is no pickle, in which torch's other file format keeps its metadata.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.tensor_file import Header, read_header

PLACES = "DCP_SHARDING_INFO"  # torch's entry of the header: JSON of name -> saved_offsets
BETWEEN = "/"  # of group and name


def flat_names(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by "<group>/<name>"; the tensors themselves, not copies."""
    return {f"{group}{BETWEEN}{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def fill_from_shards(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Fill tensors in place; a DTensor with the shards that belong to this rank. Each rank reads alone.

    Raises:
        PretrainError: a file cannot be read or does not hold what it should.
    """
    # here, since importing it takes a second and few runs need it
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what is asked for
            reader = HuggingFaceStorageReader(str(folder))
            load(dict(flat_names(groups)), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raised = next(iter(error.failures.values()))[0]
        if not isinstance(raised, (OSError, RuntimeError, ValueError, AssertionError, SafetensorError)):
            raise raised from error
        raise PretrainError(f"the shards in {folder} cannot be read: {' '.join(str(raised).split())}.") from None


def read_shards(folder: Path, groups: list[str]) -> dict[str, dict[str, Tensor]]:
    """Every whole tensor, on the CPU, by group and name. Raises PretrainError."""
    whole = {
        group: {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in named.items()}
        for group, named in outline_shards(folder, groups).items()
    }
    if any(whole.values()):
        fill_from_shards(folder, whole)
    return whole


def outline_shards(folder: Path, groups: list[str]) -> dict[str, dict[str, Tensor]]:
    """Shape and dtype of every whole tensor, on the meta device, by group and name; the headers are checked.

    Raises:
        PretrainError: a file is not well formed, or shards of a tensor are missing.
    """
    ends: dict[str, list[int]] = {}
    elements: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        for name, offsets in _places(path, header).items():
            shape, dtype, *_ = header.tensors[name]
            end = [offset + side for offset, side in zip(offsets, shape, strict=True)]
            if dtypes.setdefault(name, dtype) != dtype or len(ends.setdefault(name, end)) != len(end):
                raise PretrainError(f"{path}: {name} has another dtype or number of dimensions than in another file.")
            ends[name] = [max(sides) for sides in zip(ends[name], end, strict=True)]
            elements[name] = elements.get(name, 0) + math.prod(shape)
    found: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for name, whole in ends.items():
        group, _, rest = name.partition(BETWEEN)
        if group not in found or elements[name] != math.prod(whole):  # so that no more is allocated than is there
            raise PretrainError(f"{folder}: {name} is of no group, or its shards do not make up the shape {whole}.")
        found[group][rest] = torch.empty(whole, dtype=dtypes[name], device="meta")
    return found


def _places(path: Path, header: Header) -> dict[str, list[int]]:
    """Where in the whole tensor each of a file's shards begins. Raises PretrainError."""
    try:
        said = json.loads(header.metadata[PLACES])
        places = {name: [int(offset) for offset in said[name]["saved_offsets"]] for name in header.tensors}
        fits = all(len(place) == len(header.tensors[name][0]) for name, place in places.items())
    except (KeyError, TypeError, ValueError, RecursionError):
        fits = False
    if not fits or any(offset < 0 for place in places.values() for offset in place):
        raise PretrainError(f"{path} does not say where its shards belong ({PLACES} in its header).")
    return places
