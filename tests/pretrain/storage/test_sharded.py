"""Checkpoints that 2 gloo ranks of FSDP2 write together: what 1, 2 and 3 ranks read is what was written, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_with_torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.on_ranks import start_ranks
from tests.pretrain.saved import assert_same_bits, names, quiet_load
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage import shards
from vmf_pretrain.storage.checkpoint import Groups, outline_checkpoint, save_checkpoint
from vmf_pretrain.storage.optimizer_state import flatten_optimizer, optimizer_targets, restore_optimizer
from vmf_pretrain.storage.sharded import find_checkpoint, load_into, save_sharded
from vmf_pretrain.storage.writer import CheckpointWriter

FACTS = {"best": 1e-300, "config": {"seed": 3}}
UNEVEN = 7  # rows: 2 and 3 ranks have shares of different sizes


class Model(NamedTuple):
    """A network and its optimizer, sharded over the ranks or not."""

    net: nn.Module
    optimizer: torch.optim.AdamW

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        loss = {"centre": torch.arange(5.0)}  # all ranks have it alike
        return {"net": self.net.state_dict(), "optimizer": flatten_optimizer(self.optimizer), "loss": loss, "none": {}}


def a_model(*, sharded: bool, seed: int = 1, steps: int = 3) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, UNEVEN), nn.GELU(), nn.Linear(UNEVEN, 2))
    if sharded:
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(steps):
        net(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return Model(net, optimizer)


def whole(groups: Groups) -> dict[str, dict[str, Tensor]]:
    """Full tensors, on every rank."""
    return {
        group: {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in named.items()
        }
        for group, named in groups.items()
    }


def flat(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a pickle was read or written")


def without_pickle(patch: pytest.MonkeyPatch) -> None:
    for name in ("load", "loads", "dump", "dumps"):
        patch.setattr(pickle, name, refuse)
    patch.setattr(torch, "load", refuse)
    patch.setattr(torch, "save", refuse)


def loaded(folder: Path, group: Any) -> Groups:
    """What a fresh sharded model holds after it has loaded the newest checkpoint."""
    model = a_model(sharded=True, seed=9, steps=0)
    found = find_checkpoint(folder, group)
    state = optimizer_targets(model.optimizer, found.tensors["optimizer"])
    targets = {"net": model.net.state_dict(), "optimizer": state, "loss": {"centre": torch.zeros(5)}, "none": {}}
    load_into(found, targets)
    restore_optimizer(model.optimizer, state)
    assert found.state == FACTS, found.state
    return whole({**model.tensors(), "loss": targets["loss"]})


def fails_on(rank: int, call: int) -> Callable[..., None]:
    """``os.fsync`` whose disk is full for one rank, from its ``call``-th call on."""
    calls = []

    def fsync(_: int) -> None:
        calls.append(1)
        if distributed.get_rank() == rank and len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


def on_two_ranks(folder: Path, group: Any) -> dict[str, Tensor]:
    """Save in the background, load, fail to save, and load what one process wrote."""
    model = a_model(sharded=True)
    with pytest.MonkeyPatch.context() as patch:
        without_pickle(patch)
        with CheckpointWriter(partial(save_sharded, folder / "sharded", keep=2, group=group)) as writer:
            writer.save(3, model.tensors(), FACTS)
            expected = whole(model.tensors())
            for parameter in model.net.parameters():  # training goes on while the thread writes
                parameter.detach().mul_(2)
        assert (writer.saved, writer.failures) == (3, []), writer.failures
        assert_same_bits(flat(loaded(folder / "sharded", group)), flat(expected))
    before = {path: path.read_bytes() for path in (folder / "sharded").rglob("*") if path.is_file()}
    for rank, call in ((0, 1), (1, 1), (0, 2), (0, 3)):
        distributed.barrier()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fails_on(rank, call))
            with pytest.raises(PretrainError, match=r"step_00000004 could not be written.*No space left"):
                save_sharded(folder / "sharded", 4, model.tensors(), FACTS, keep=2, group=group)
        distributed.barrier()
        after = {path: path.read_bytes() for path in (folder / "sharded").rglob("*") if path.is_file()}
        assert after == before, f"rank {rank}, call {call}: {sorted(map(str, after.keys() ^ before.keys()))}"
    assert_same_bits(flat(loaded(folder / "single", group)), flat(expected))
    with pytest.raises(PretrainError, match="holds no checkpoint"):
        find_checkpoint(folder / "nowhere", group)
    return flat(expected)


def on_three_ranks(folder: Path, group: Any) -> dict[str, Tensor]:
    return flat(loaded(folder / "sharded", group))


def run_rank(rank: int, folder: Path, ranks: int, act: Callable[[Path, Any], dict[str, Tensor]]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{ranks}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.save(act(folder, distributed.new_group(backend="gloo")), folder / f"{ranks}-{rank}.pt")
    distributed.barrier()  # gloo may abort if a rank leaves while another still talks to it
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 ranks left, and beside it the same model as one process writes it; not to be changed."""
    made = tmp_path_factory.mktemp("sharded")
    model = a_model(sharded=False)
    save_checkpoint(made / "single", 3, model.tensors(), FACTS, keep=1)
    start_ranks(run_rank, (made, 2, on_two_ranks), 2)
    return made


def written(folder: Path, ranks: int = 2, rank: int = 0) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(folder / f"{ranks}-{rank}.pt", weights_only=True)
    return tensors


def test_one_process_reads_what_two_ranks_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written(folder)
    without_pickle(monkeypatch)
    found = quiet_load(folder / "sharded")
    assert (found.step, found.state, found.layout) == (3, FACTS, "sharded")
    assert_same_bits(flat(found.tensors), expected)
    assert found.tensors["none"] == {}, "a group without tensors came back with some, or not at all"
    outline = outline_checkpoint(folder / "sharded")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in flat(outline.tensors).items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}


def test_three_ranks_read_what_two_wrote(folder: Path) -> None:
    start_ranks(run_rank, (folder, 3, on_three_ranks), 3)
    for rank in range(3):
        assert_same_bits(written(folder, 3, rank), written(folder))


def test_ranks_and_one_process_train_to_the_same_bits(folder: Path) -> None:
    """So that what the ranks read of one process's checkpoint was compared with the right tensors."""
    assert_same_bits(flat(quiet_load(folder / "single").tensors), written(folder))


def test_a_sharded_checkpoint_is_safetensors_and_json_alone(folder: Path) -> None:
    checkpoint = folder / "sharded" / "step_00000003"
    assert names(folder / "sharded") == ["LATEST", checkpoint.name]
    listed = json.loads((checkpoint / "state.json").read_text())["files"]
    assert len(listed) == 2, f"expected a file for each rank; got {sorted(listed)}"
    assert names(checkpoint) == sorted([*listed, "state.json"])
    for name in listed:
        assert load_file(checkpoint / name), f"{name} is empty"
        mode = (checkpoint / name).stat().st_mode
        assert mode & 0o113 == 0, f"{name} can be run, or written by anyone: {oct(mode)}"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_other_format_of_torch_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of ``without_pickle``."""
    without_pickle(monkeypatch)
    with pytest.raises(BaseException, match="a pickle was read or written"):
        save_with_torch({"x": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda places: places["net/0.weight"].update(saved_offsets=[2**40, 0]), "do not make up the shape"),
        (lambda places: places["net/0.weight"].update(saved_offsets=[-4, 0]), "does not say where its shards belong"),
        (lambda places: places["net/0.weight"].update(saved_offsets=[4]), "does not say where its shards belong"),
        (lambda places: places.pop("net/0.weight"), "does not say where its shards belong"),
    ],
    ids=["far", "negative", "dimensions", "missing"],
)
def test_shards_that_claim_a_wrong_place_are_refused(
    change: Callable[[Any], Any], said: str, folder: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in (folder / "sharded" / "step_00000003").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()[shards.PLACES])
        if path.name.startswith("shard-00002"):
            change(places)
        save_file(load_file(path), tmp_path / path.name, {shards.PLACES: json.dumps(places)})
    with pytest.raises(PretrainError, match=said):
        shards.read_shards(tmp_path, ["net", "optimizer", "loss", "none"])
