"""Checkpoints: what comes back, what is kept, and what damage does."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pretrain.saved import assert_same_bits, names, quiet_load, save, some_tensors
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.checkpoint import load_checkpoint, save_checkpoint
from vmf_pretrain.storage.manifest import hash_of

pytestmark = pytest.mark.quick

# What comes back


def test_tensors_state_and_step_come_back(tmp_path: Path) -> None:
    tensors = some_tensors()
    state = {"losses": [0.1, 1e-300, 2.0], "name": "ünïcode", "nested": {"a": None, "b": True}}
    path = save_checkpoint(tmp_path, 123, tensors, state, keep=1)
    loaded = quiet_load(tmp_path)
    assert path == loaded.path == tmp_path / "step_00000123", f"got {path} and {loaded.path}"
    assert loaded.step == 123, f"step is {loaded.step}"
    assert loaded.state == state, f"state is {loaded.state}"
    for group, expected in tensors.items():
        assert_same_bits(loaded.tensors[group], expected)


def test_strided_shared_expanded_empty_and_scalar_tensors_come_back(tmp_path: Path) -> None:
    storage = torch.randn(6, 8)
    tensors = {
        "whole": storage,
        "view": storage[1:3],
        "same": storage,
        "transposed": storage.T,
        "expanded": torch.arange(3.0).expand(5, 3),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(2)),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "integers": torch.tensor([2**62 + 1]),
        "flags": torch.tensor([True, False]),
    }
    save_checkpoint(tmp_path, 1, {"group": tensors}, {}, keep=1)
    assert_same_bits(quiet_load(tmp_path).tensors["group"], {name: tensor.detach() for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8])
def test_dtypes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(5).to(dtype)
    save_checkpoint(tmp_path, 1, {"group": {"x": tensor}}, {}, keep=1)
    got = quiet_load(tmp_path).tensors["group"]["x"]
    assert got.dtype == dtype, f"got {got.dtype}"
    assert torch.equal(got, tensor), f"got {got}; expected {tensor}"


def test_a_group_without_tensors_comes_back_empty(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"optimizer": {}}, {}, keep=1)
    assert quiet_load(tmp_path).tensors == {"optimizer": {}}


def test_state_comes_back_as_json_has_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {}, {"pair": (1, 2), "by_number": {10: "a", 9: "b"}}, keep=1)
    state = quiet_load(tmp_path).state
    assert state == {"pair": [1, 2], "by_number": {"10": "a", "9": "b"}}, f"state is {state}"


def test_a_loaded_tensor_can_be_written_to(tmp_path: Path) -> None:
    save(tmp_path, 1)
    weight = quiet_load(tmp_path).tensors["student"]["weight"]
    weight.zero_()
    assert not weight.any(), f"{weight}"
    assert quiet_load(tmp_path).tensors["student"]["weight"].any(), "writing to a loaded tensor changed the file"


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read or written")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    save(tmp_path, 5)
    assert quiet_load(tmp_path).step == 5


# Which ones are there


def test_latest_names_the_last_one_saved_and_older_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["LATEST", "step_00000003", "step_00000004"]
    latest = (tmp_path / "LATEST").read_text()
    assert latest == "step_00000004\n", f"LATEST holds {latest!r}"


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    step = quiet_load(tmp_path).step
    assert step == 100_000_000, f"loaded step {step}"


def test_a_later_checkpoint_never_pushes_out_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 200)
    save(tmp_path, 100, keep=1)
    assert names(tmp_path) == ["LATEST", "step_00000100", "step_00000200"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 7, value=1.0)
    save(tmp_path, 7, value=2.0)
    loaded = quiet_load(tmp_path)
    assert loaded.state == {"value": 2.0}, f"state is {loaded.state}"
    assert names(tmp_path) == ["LATEST", "step_00000007"]


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_final").mkdir()
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["LATEST", "notes.txt", "step_00000002", "step_final"]


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_00000001").mkdir()
    (tmp_path / ".tmp-step_00000001" / "student.safetensors").write_bytes(b"half")
    save(tmp_path, 2)
    assert names(tmp_path) == ["LATEST", "step_00000002"]


def test_an_old_checkpoint_that_cannot_be_removed_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match=r"step_00000001 could not be removed: Permission denied"):
        save(tmp_path, 2, keep=1)
    assert quiet_load(tmp_path).step == 2


@pytest.mark.parametrize(
    ("step", "keep", "group"), [(-1, 1, "student"), (0, 0, "student"), (0, 1, "../x"), (0, 1, "a.b")]
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, step: int, keep: int, group: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        save_checkpoint(tmp_path / "out", step, {group: {}}, {}, keep=keep)
    assert not (tmp_path / "out").exists(), f"{names(tmp_path)}"


def test_state_that_json_cannot_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, 2, some_tensors(), {"tensor": torch.zeros(1)}, keep=1)
    assert names(tmp_path) == before


# Damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_value(path: Path) -> None:
    """Still JSON, another value: what only a hash can tell."""
    text = path.read_text()
    assert '"value": 2.0' in text, text
    path.write_text(text.replace('"value": 2.0', '"value": 3.0'))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def not_an_object(path: Path) -> None:
    path.write_text("[1, 2]")


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("student.safetensors", flip_a_byte, r"student\.safetensors .* has sha256"),
    ("rng.safetensors", truncate, r"rng\.safetensors .* has sha256"),
    ("student.safetensors", empty, r"student\.safetensors \(0 bytes\) has sha256"),
    ("student.safetensors", Path.unlink, r"student\.safetensors is missing"),
    ("state.json", Path.unlink, r"state\.json is missing"),
    ("state.json", truncate, r"state\.json is not JSON"),
    ("state.json", empty, r"state\.json is not JSON"),
    ("state.json", garbage, r"state\.json is not JSON"),
    ("state.json", not_an_object, r"state\.json does not match its own sha256"),
    ("state.json", change_a_value, r"state\.json does not match its own sha256"),
]
DAMAGE_IDS = [f"{damage.__name__}-{name}" for name, damage, _ in DAMAGES]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES, ids=DAMAGE_IDS)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_why(
    tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    with pytest.warns(UserWarning, match=rf"step_00000002: {reason}.*using step_00000001"):
        loaded = load_checkpoint(tmp_path)
    assert (loaded.step, loaded.state) == (1, {"value": 1.0}), f"loaded step {loaded.step} with {loaded.state}"


def test_every_single_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"group": {"x": torch.tensor([1.0, 2.0])}}, {"value": 0.5}, keep=1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(len(whole)):
            if file.name == "state.json" and chr(whole[place]).isspace():
                continue  # JSON's layout carries nothing
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(PretrainError, match="no usable checkpoint"):
                load_checkpoint(tmp_path)
        file.write_bytes(whole)
    assert quiet_load(tmp_path).step == 1


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step_00000009")
    (tmp_path / "LATEST").unlink()
    with pytest.raises(PretrainError, match=r"step_00000009: state\.json is of step 1"):
        load_checkpoint(tmp_path)


def rewrite_description(path: Path, **entries: Any) -> None:
    """As someone would who also mends the hashes."""
    described = json.loads((path / "state.json").read_text())
    del described["sha256"]
    described.update(entries)
    described["sha256"] = hash_of(described)
    (path / "state.json").write_text(json.dumps(described))


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, (10**15).to_bytes(8, "little") + b"{}"])
def test_a_tensor_file_that_is_none_is_refused_cleanly(tmp_path: Path, header: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "student.safetensors").write_bytes(header)
    (path / "rng.safetensors").unlink()
    rewrite_description(path, files={"student.safetensors": hashlib.sha256(header).hexdigest()})
    with pytest.raises(PretrainError, match="tensors cannot be parsed"):
        load_checkpoint(tmp_path)


def test_a_file_outside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 1)
    (tmp_path / "secret.safetensors").write_bytes(b"")
    outside = {"../../secret.safetensors": hashlib.sha256(b"").hexdigest()}
    rewrite_description(path, files=outside)
    with pytest.raises(PretrainError, match="no plain file name"):
        load_checkpoint(tmp_path / "run")


def test_unknown_entries_are_refused(tmp_path: Path) -> None:
    rewrite_description(save(tmp_path, 1), surplus=1)
    with pytest.raises(PretrainError, match=r"has the entries .*surplus"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_latest_names_but_is_gone_is_warned_of(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"step_00000002: LATEST names it but it is missing; using step_00000001"):
        assert load_checkpoint(tmp_path).step == 1


def test_all_damaged_is_an_error_that_lists_each(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_byte(save(tmp_path, step) / "student.safetensors")
    with pytest.raises(PretrainError, match=r"no usable checkpoint \(step_00000002: .*; step_00000001: .*\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("folder", ["missing", ""])
def test_no_checkpoint_is_an_error(tmp_path: Path, folder: str) -> None:
    with pytest.raises(PretrainError, match=r"holds no checkpoint; expected a folder"):
        load_checkpoint(tmp_path / folder)
