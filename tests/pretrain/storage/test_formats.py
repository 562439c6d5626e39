"""Which folders are read as checkpoints, and whose: older and newer versions, surplus files, links, rights."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.saved import assert_same_bits, names, quiet_load, save, some_tensors
from tests.pretrain.tiny import digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.storage.checkpoint import load_checkpoint, outline_checkpoint, require_same_tensors, save_checkpoint
from vmf_pretrain.storage.lines import JsonLines
from vmf_pretrain.storage.lock import RunLock
from vmf_pretrain.storage.manifest import FORMAT, hash_of
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tolerant import TolerantWrites
from vmf_pretrain.storage.weights import Weights, save_weights

pytestmark = pytest.mark.quick


def redescribed(path: Path, drop: tuple[str, ...] = (), **entries: Any) -> None:
    """Another description, with the right hash."""
    described = json.loads((path / "state.json").read_text())
    described = {name: value for name, value in {**described, **entries}.items() if name not in (*drop, "sha256")}
    described["sha256"] = hash_of(described)
    (path / "state.json").write_text(json.dumps(described))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = save_checkpoint(tmp_path, 3, tensors, {"best": 0.5}, keep=1)
    redescribed(path, drop=("format", "layout", "groups"))
    found = quiet_load(tmp_path)
    assert (found.step, found.state, found.layout) == (3, {"best": 0.5}, "whole")
    assert_same_bits(found.tensors["student"], tensors["student"])


@pytest.mark.parametrize("version", [FORMAT + 1, 0, "2", None])
def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(version: Any, tmp_path: Path) -> None:
    save(tmp_path, 1)
    redescribed(save(tmp_path, 2), format=version, surplus=1)
    with pytest.raises(
        PretrainError, match=rf"has format {version}, which a newer vmf_kernels wrote; this one reads up to 2"
    ):
        load_checkpoint(tmp_path)


def test_a_surplus_tensor_file_is_damage_and_other_files_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / ".DS_Store").write_bytes(b"x")
    assert quiet_load(tmp_path).step == 2
    (path / "other.safetensors").write_bytes((path / "student.safetensors").read_bytes())
    with pytest.warns(
        UserWarning, match=r"step_00000002: other.safetensors is not listed in state.json; using step_0+1"
    ):
        assert load_checkpoint(tmp_path).step == 1


def test_an_outline_has_shapes_and_no_values(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_checkpoint(tmp_path, 1, tensors, {"a": 1}, keep=1)
    found = outline_checkpoint(tmp_path)
    assert all(t.is_meta for named in found.tensors.values() for t in named.values())
    for group, named in tensors.items():
        require_same_tensors(group, found.tensors[group], named)
    assert found.state == {"a": 1}


def test_tensors_that_are_not_those_of_the_module_are_refused_with_every_name() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4), "d": torch.zeros(1)}
    found = {"a": torch.zeros(2), "b": torch.zeros(3, 1), "c": torch.zeros(4).half(), "extra": torch.zeros(1)}
    with pytest.raises(PretrainError) as refusal:
        require_same_tensors("student", found, expected)
    for part in (
        "checkpoint's student does not fit",
        "b is torch.float32 of shape (3, 1) but must be torch.float32 of shape (3,)",
        "c is torch.float16 of shape (4,) but must be torch.float32",
        "d is missing",
        "extra is surplus",
    ):
        assert part in str(refusal.value), f"{part!r} is not in {refusal.value}"
    require_same_tensors("student", expected, expected)


# Links


def test_nothing_is_deleted_through_a_link_out_of_the_run_folder(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for step in (1, 2):
        save(elsewhere, step)
    (elsewhere / ".tmp-step_00000007").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    with pytest.warns(UserWarning, match=r"is a link out of the run folder, so old checkpoints in it stay: .*00000001"):
        save(run / "checkpoints", 3, keep=1)
    assert names(elsewhere) == [".tmp-step_00000007", "LATEST", *(f"step_0000000{step}" for step in (1, 2, 3))]
    assert quiet_load(run / "checkpoints").step == 3


@pytest.mark.parametrize("name", ["step_00000001", ".tmp-step_00000003", ".old-step_00000002"])
def test_a_checkpoint_that_is_a_link_goes_and_what_it_leads_to_stays(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    folder = tmp_path / "checkpoints"
    save(folder, 2)
    (folder / name).symlink_to(precious)
    save(folder, 3, keep=1)
    assert names(folder) == ["LATEST", "step_00000003"]
    assert names(precious) == ["thesis.txt"]


def test_a_run_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big")
    with RunLock.take(tmp_path / "run"):
        folder = RunFolder.create(tmp_path / "run")
        for step in (1, 2):
            save(folder.checkpoints, step, keep=1)
    assert names(tmp_path / "big" / "checkpoints") == ["LATEST", "step_00000002"]


# Rights


@pytest.fixture
def umask() -> Iterator[None]:
    """Others may do nothing, the group may not write."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
@pytest.mark.usefixtures("umask")
def test_files_have_the_users_rights_and_none_can_be_run(tmp_path: Path) -> None:
    with RunLock.take(tmp_path / "run"):
        folder = RunFolder.create(tmp_path / "run")
        save(folder.checkpoints, 1)
        JsonLines(folder.bad_files, TolerantWrites()).write({})
        save_weights(
            Weights(folder.weights / "x.safetensors", {"x": torch.ones(1)}, network_input(digits_config()), {})
        )
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.path.rglob("*")}
    wrong = {str(path): oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)}
    assert len(modes) > 10, f"only {sorted(map(str, modes))}"
    assert not wrong, wrong
