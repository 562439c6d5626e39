"""Saving in the background: what is written is what there was, one at a time, and no failure is lost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretrain.saved import assert_same_bits, names, quiet_load
from tests.pretrain.tiny import digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.storage.checkpoint import Groups, save_checkpoint
from vmf_pretrain.storage.host_copy import HostCopies
from vmf_pretrain.storage.weights import Weights, load_weights
from vmf_pretrain.storage.writer import CheckpointWriter

pytestmark = pytest.mark.quick

PATIENCE = 60.0  # seconds, after which a thread that should go on is stuck
FED = network_input(digits_config())


class Gate:
    """A save that waits until it is let through; knows how many are in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.open, self.inside, self.most = folder, threading.Event(), 0, 0

    def __call__(self, step: int, tensors: Groups, state: Mapping[str, Any]) -> Path:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.open.wait(PATIENCE)
        self.inside -= 1
        return save_checkpoint(self.folder, step, tensors, state, keep=5)


def groups(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {"net": {"weight": torch.full((3, 2), value), "count": torch.tensor(value)}}


def disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_what_there_was(tmp_path: Path) -> None:
    tensors, state = groups(), {"list": [1]}
    gate = Gate(tmp_path)
    with CheckpointWriter(gate) as writer:
        writer.save(1, tensors, state)
        tensors["net"]["weight"].zero_()
        state["list"].append(2)
        writer.check()
        assert writer.saved is None, "it is not written yet"
        gate.open.set()
    found = quiet_load(tmp_path)
    assert_same_bits(found.tensors["net"], groups()["net"])
    assert found.state == {"list": [1]}
    assert writer.saved == 1


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with CheckpointWriter(gate) as writer:
        writer.save(1, groups(1), {})
        threading.Timer(0.05, gate.open.set).start()
        writer.save(2, groups(2), {})
        assert writer.saved == 1, "the second save began before the first was whole"
        assert 0 < writer.waited <= writer.held
    assert (writer.saved, gate.most) == (2, 1)
    assert quiet_load(tmp_path).tensors["net"]["weight"].unique().item() == 2


def test_a_full_disk_is_said_and_counted_and_the_next_save_works(tmp_path: Path) -> None:
    said: list[str] = []
    weights = Weights(tmp_path / "last.safetensors", groups()["net"], FED, {})
    with CheckpointWriter(partial(save_checkpoint, tmp_path / "checkpoints", keep=2), said.append) as writer:
        writer.save(1, groups(), {}, [weights])
        writer.wait()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", disk_full)
            writer.save(2, groups(2), {}, [weights])
            writer.wait()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert writer.saved == 1
        assert said == writer.failures
        assert len(said) == 2, said
        assert "Checkpoint step_00000002 could not be written" in said[0], said
        assert "Weights" in said[1], said
        assert all("No space left on device" in sentence for sentence in said), said
        writer.save(3, groups(), {})
    assert (writer.saved, len(writer.failures)) == (3, 2)


def test_by_default_a_failure_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(partial(save_checkpoint, tmp_path / "file", keep=1))
    writer.save(1, groups(), {})
    with pytest.warns(UserWarning, match="step_00000001 could not be written"):
        writer.wait()


def test_a_failure_is_said_by_the_first_check_after_it() -> None:
    done = threading.Event()

    def save(*_: Any) -> Path:
        done.set()
        raise PretrainError("no.")

    said: list[str] = []
    with CheckpointWriter(save, said.append) as writer:
        writer.save(1, groups(), {})
        assert done.wait(PATIENCE)
        while not said:
            writer.check()
    assert len(said) == 1, said


def test_a_mistake_of_the_program_is_raised(tmp_path: Path) -> None:
    def save(*_: Any) -> Path:
        raise KeyError("mistake")

    writer = CheckpointWriter(save)
    writer.save(1, groups(), {})
    with pytest.raises(KeyError, match="mistake"):
        writer.wait()
    with pytest.raises(TypeError, match="JSON"):
        writer.save(2, groups(), {"tensor": torch.ones(1)})
    assert names(tmp_path) == []


def test_weights_of_the_same_step_share_the_copy(tmp_path: Path) -> None:
    teacher = {"backbone.x": torch.arange(3.0)}
    tensors = {"net": groups()["net"], "teacher": teacher}
    with CheckpointWriter(partial(save_checkpoint, tmp_path / "checkpoints", keep=1)) as writer:
        writer.save(1, tensors, {}, [Weights(tmp_path / "last.safetensors", teacher, FED, {"step": 1})])
        writer.export(Weights(tmp_path / "best.safetensors", teacher, FED, {"step": 1}))
        teacher["backbone.x"].zero_()
    for name in ("last", "best"):
        loaded, fed = load_weights(tmp_path / f"{name}.safetensors")
        assert_same_bits(loaded, {"backbone.x": torch.arange(3.0)})
        assert fed == FED
    copies = HostCopies().copy({**tensors, "weights": teacher})
    assert copies["weights"]["backbone.x"] is copies["teacher"]["backbone.x"]


def test_copies_use_their_memory_again_and_follow_a_new_shape() -> None:
    host, tensor = HostCopies(), torch.arange(6.0)
    first = host.copy({"a": {"x": tensor, "view": tensor[::2], "none": torch.empty(0)}})
    assert_same_bits(first["a"], {"x": tensor, "view": tensor[::2], "none": torch.empty(0)})
    tensor += 1
    second = host.copy({"a": {"x": tensor, "view": tensor[::2], "none": torch.empty(0)}})
    assert second["a"]["x"].data_ptr() == first["a"]["x"].data_ptr()
    assert_same_bits(second["a"], {"x": tensor, "view": tensor[::2], "none": torch.empty(0)})
    assert host.copy({"a": {"x": tensor[:2]}})["a"]["x"].tolist() == [1.0, 2.0]
