"""Checkpoints of the published codebases, loaded by each drop-in; wrappers, what is missing, what is whole."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from tests.compat.checkpoint_files import (
    DIM,
    FORMATS,
    K2,
    SIZES,
    STATE,
    K,
    Parts,
    dino_parts,
    dinov2_parts,
    dinov2_run,
    lightly_file,
    main_dino,
    moved,
    under,
)
from vmf_kernels.compat import dino, dinov2, lightly

pytestmark = pytest.mark.quick


def assert_holds(part: nn.Module, state: STATE, said: str) -> None:
    got = part.state_dict()
    assert state, f"{said}: the checkpoint has nothing for it"
    assert got.keys() == state.keys(), said
    wrong = [key for key in got if not torch.equal(got[key], state[key])]
    assert not wrong, f"{said}: {wrong} differ"


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("way", ["zip", "stream", "mapping"])
@pytest.mark.parametrize("codebase", FORMATS)
def test_a_run_s_checkpoint_loads(codebase: str, way: str, network: str, tmp_path: Path) -> None:
    make, parts_of, load, place = FORMATS[codebase]
    file, parts = make(), parts_of()
    torch.save(file, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=way == "zip")
    load(file if way == "mapping" else tmp_path / "checkpoint.pth", network, parts)
    for name, part in parts.items():
        assert_holds(part, place(file, network, name), f"{codebase} {network} {name}")


@pytest.mark.parametrize("codebase", FORMATS)
def test_the_two_networks_of_those_checkpoints_differ(codebase: str) -> None:
    """Negative control: the wrong network would be seen."""
    make, parts_of, _, place = FORMATS[codebase]
    file = make()
    for name in parts_of():
        if not name.endswith("loss"):
            states = [place(file, network, name) for network in ("teacher", "student")]
            assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0]), name


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled under DDP": lambda key: f"module._orig_mod.{key}",
    "DDP, compiled": lambda key: f"_orig_mod.module.{key}",
    "DDP twice": lambda key: f"module.module.{key}",
    "compiled parts": lambda key: key.replace(".", "._orig_mod.", 1),
    "parts under DDP": lambda key: key.replace(".", ".module.", 1),
    "compiled layers": lambda key: key.replace(".last_layer.", ".last_layer._orig_mod."),
    "FSDP": lambda key: "_fsdp_wrapped_module." + key.replace("mlp.", "mlp._fsdp_wrapped_module."),
    "activation checkpointing": lambda key: key.replace("head.", "head._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers_in_keys_are_passed_over(wrapper: str) -> None:
    file, parts = main_dino(), dino_parts()
    wrapped = {WRAPPED[wrapper](key): value for key, value in file["teacher"].items()}
    assert wrapped.keys() != file["teacher"].keys()
    dino.load_checkpoint(file | {"teacher": wrapped}, backbone=parts["backbone"], head=parts["head"])
    for name in ("backbone", "head"):
        assert_holds(parts[name], under(file["teacher"], f"{name}."), name)


def compiled(part: nn.Module) -> nn.Module:
    module: nn.Module = torch.compile(part, backend="eager")  # type: ignore[assignment]
    return module


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "wrap",
    [compiled, nn.parallel.DistributedDataParallel, lambda part: nn.Sequential(OrderedDict(mlp=compiled(part)))],
    ids=["compiled", "DDP", "compiled part"],
)
def test_modules_of_ours_may_be_wrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    part = nn.Linear(2, 3)
    wrapped, state = wrap(part), copy.deepcopy(moved(nn.Linear(2, 3)).state_dict())
    prefix = "head.mlp." if isinstance(wrapped, nn.Sequential) else "head."
    dino.load_checkpoint({"teacher": {prefix + key: value for key, value in state.items()}}, head=wrapped)
    assert_holds(part, state, "wrapped")


def test_a_part_of_the_name_module_deeper_down_is_no_wrapper() -> None:
    part = nn.Sequential(OrderedDict(inner=Parts(module=nn.Linear(2, 3))))
    state = copy.deepcopy(moved(part).state_dict())
    dino.load_checkpoint({"teacher": {f"module.head.{key}": value for key, value in state.items()}}, head=part)
    assert_holds(part, state, "inner.module")


def test_dinov2_s_teacher_and_bare_states_load(tmp_path: Path) -> None:
    """What an evaluation saves, and the state of the whole run without a file around it."""
    run = dinov2_run()
    torch.save({"teacher": run.get_submodule("teacher").state_dict()}, tmp_path / "teacher_checkpoint.pth")
    torch.save(run.state_dict(), tmp_path / "bare.pth")
    for name in ("teacher_checkpoint.pth", "bare.pth"):
        parts = dinov2_parts()
        networks = {part: module for part, module in parts.items() if not part.endswith("loss")}
        dinov2.load_checkpoint(tmp_path / name, **networks)  # type: ignore[arg-type]
        for part, module in networks.items():
            assert_holds(module, under(run.state_dict(), f"teacher.{part}."), f"{name} {part}")


def test_a_loss_that_is_not_in_the_teacher_s_file_is_named() -> None:
    teacher = {"teacher": dinov2_run().get_submodule("teacher").state_dict()}
    with pytest.raises(ValueError, match="checkpoint has the entries teacher; expected 'dino_loss' among them"):
        dinov2.load_checkpoint(teacher, dino_loss=dinov2.DINOLoss(K))


def test_a_shared_head_s_missing_part_is_named() -> None:
    run = {key: value for key, value in dinov2_run().state_dict().items() if ".ibot_head." not in key}
    with pytest.raises(
        ValueError, match=r"the student entry has keys under backbone, dino_head; .* under 'ibot_head.'"
    ):
        dinov2.load_checkpoint({"model": run}, network="student", ibot_head=dinov2.DINOHead(DIM, K2, **SIZES))


def flat_shard() -> Any:
    """What FSDP's LOCAL_STATE_DICT holds of a unit: DINOv2's model_*.rank_0.pth."""
    from torch.distributed._shard import sharded_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shard = sharded_tensor.Shard.from_tensor_and_offsets(torch.zeros(4), [0], 0)
        return sharded_tensor.init_from_local_shards([shard], 4)


def fsdp2_shard() -> Any:
    from torch.distributed.tensor import DeviceMesh, Replicate
    from torch.distributed.tensor import DTensor as Sharded

    return Sharded.from_local(torch.zeros(K, 1), DeviceMesh("cpu", [0]), [Replicate()])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("key", "shard"), [("_flat_param", flat_shard), ("last_layer.weight_g", fsdp2_shard)], ids=["FSDP1", "FSDP2"]
)
def test_a_part_of_one_rank_is_named_with_the_way_out(key: str, shard: Callable[[], Any], tmp_path: Path) -> None:
    torch.save({"model": {f"teacher.dino_head.{key}": shard()}}, tmp_path / "model_0001249.rank_0.pth")
    message = rf"entry has one rank's part of .*{key}; expected a whole tensor: .*FULL_STATE_DICT.*teacher_checkpoint"
    with pytest.raises(ValueError, match=message):
        dinov2.load_checkpoint(tmp_path / "model_0001249.rank_0.pth", dino_head=dinov2.DINOHead(DIM, K, **SIZES))


def test_an_unknown_name_of_a_lightning_module_is_named() -> None:
    names = "student_backbone, teacher_backbone, criterion, student_head, teacher_head"
    with pytest.raises(ValueError, match=rf"the state dict has keys under {names}; expected some under 'head.'"):
        lightly.load_checkpoint(lightly_file(), {"head": lightly.DINOProjectionHead(DIM, 16, 8, K)})


def test_names_of_deeper_modules_and_bare_states_load() -> None:
    """lightly's DINOv2 keeps both heads in one module; its examples without lightning save a state dict alone."""
    head, source = (moved(lightly.DINOv2ProjectionHead(DIM, 16, 8, K)) for _ in range(2))
    state = Parts(teacher=Parts(dino_head=source)).state_dict()
    lightly.load_checkpoint(state, {"teacher.dino_head": head})
    assert_holds(head, source.state_dict(), "teacher.dino_head")


@pytest.mark.parametrize("missing", ["teacher", "dino_loss", "head"])
def test_nothing_is_loaded_where_something_is_missing(missing: str) -> None:
    file, parts = main_dino(), dino_parts()
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    if missing == "head":
        file["teacher"] = {key: value for key, value in file["teacher"].items() if not key.startswith("head.")}
    else:
        del file[missing]
    with pytest.raises(ValueError, match="expected"):
        dino.load_checkpoint(file, **parts)  # type: ignore[arg-type]
    for name, part in parts.items():
        assert_holds(part, before[name], name)


@pytest.mark.parametrize("form", ["plain", "parametrization"])
@pytest.mark.parametrize("codebase", ["dino", "ibot", "dinov2"])
def test_last_layers_stored_otherwise_load(codebase: str, form: str, tmp_path: Path) -> None:
    make, parts_of, load, place = FORMATS[codebase]
    file, parts, part = make(), parts_of(), "dino_head" if codebase == "dinov2" else "head"
    expected = place(file, "teacher", part)
    state = file["model"] if codebase == "dinov2" else file["teacher"]
    for key in [key for key in state if key.endswith(".weight_g")]:
        layer = key.removesuffix("weight_g")
        norms, directions = state.pop(key), state.pop(f"{layer}weight_v")
        if form == "plain":
            state[f"{layer}weight"] = norms * directions / directions.norm(dim=1, keepdim=True)
        else:
            state |= {
                f"{layer}parametrizations.weight.original{i}": value for i, value in enumerate((norms, directions))
            }
    torch.save(file, tmp_path / "checkpoint.pth")
    load(tmp_path / "checkpoint.pth", "teacher", {part: parts[part]})
    layer = parts[part].get_submodule("last_layer")
    torch.testing.assert_close(layer.weight_g, expected["last_layer.weight_g"])
    unit = [nn.functional.normalize(v, dim=-1) for v in (layer.weight_v.detach(), expected["last_layer.weight_v"])]  # type: ignore[operator]
    torch.testing.assert_close(*unit)


UNFIT: dict[str, tuple[Any, str]] = {
    "whole module": (
        {"teacher": nn.Linear(2, 2)},
        "entry 'teacher' is torch.nn.modules.linear.Linear; expected a mapping",
    ),
    "value": (
        {"teacher": {"head.x": np.float64(1)}},
        r"the teacher entry has .*scalar under head.x; expected a tensor",
    ),
    "list": ([1], "checkpoint holds list; expected a mapping with the entry 'teacher'"),
    "configuration": (argparse.Namespace(a=1), "checkpoint holds argparse.Namespace; expected a mapping"),
    "many entries": (dict.fromkeys(map(str, range(99)), 0), "entries 0, 1, 2, .*, 11 and 87 more; expected 'teacher'"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    torch.save(UNFIT[kind][0], tmp_path / "file.pth")
    with pytest.raises(ValueError, match=UNFIT[kind][1]):
        dino.load_checkpoint(tmp_path / "file.pth", head=nn.Linear(2, 2))


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    path, weight = tmp_path / "file.pth", torch.rand(50)
    torch.save({"teacher": {"head.weight": weight}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes())] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the teacher entry, head.weight: a tensor of size \(50,\) cannot be read"):
        dino.load_checkpoint(path, head=nn.Linear(2, 2))


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dino.load_checkpoint(tmp_path / "gone.pth", head=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is a directory"):
        lightly.load_checkpoint(tmp_path, {})
