"""Checkpoints as runs of the published codebases write them, loaded by each drop-in; wrappers, what is missing, what is whole.

Each is made by the rules of its format: what the trainer puts into the file, and what its optimizer, schedules and wrappers
leave there.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from tests.published import PublishedDINOHead, PublishedDINOLoss
from tests.published_dinov2 import PublishedPatchLoss, PublishedV2Head, PublishedV2Loss
from tests.published_ibot import PublishedIBOTHead, PublishedIBOTLoss
from vmf_kernels.compat import dino, dinov2, ibot, lightly, solo

pytestmark = pytest.mark.quick

DIM, K, K2 = 6, 31, 23
SIZES: dict[str, Any] = {"hidden_dim": 16, "bottleneck_dim": 8}
SCHEDULE = (0.04, 0.07, 2, 5)
STATE = dict[str, Tensor]


class Parts(nn.Module):
    """A network under the names its codebase gives the parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(5, DIM), nn.BatchNorm1d(DIM))


def moved(network: nn.Module) -> nn.Module:
    """Every number of it is another than at the start."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.copy_(1 + torch.rand(value.shape) if value.is_floating_point() else torch.tensor(7))
    return network


def trained(student: nn.Module) -> torch.optim.Optimizer:
    """After a step under the published schedules, which hand numpy's numbers to the optimizer's groups."""
    decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    schedule = np.concatenate(
        (np.linspace(0, 5e-4, 2), 1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + np.cos(np.pi * np.arange(3) / 3)))
    )
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = schedule[1]
        if number == 0:
            group["weight_decay"] = schedule[2]
    for p in decayed + others:
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand_like(p),
            "exp_avg_sq": torch.rand_like(p),
        }
    return optimizer


def command_line() -> argparse.Namespace:
    return argparse.Namespace(arch="vit_small", out_dim=K, lr=5e-4, output_dir=Path("."), local_crops_scale=(0.05, 0.4))


def main_dino() -> dict[str, Any]:
    """facebookresearch/dino main_dino.py: the student under DDP, the teacher not."""
    student, teacher = (
        moved(Parts(backbone=backbone(), head=PublishedDINOHead(DIM, K, norm_last_layer=norm, **SIZES)))
        for norm in (False, True)
    )
    return {
        "student": {f"module.{key}": value for key, value in student.state_dict().items()},
        "teacher": teacher.state_dict(),
        "optimizer": trained(student).state_dict(),
        "epoch": 3,
        "args": command_line(),
        "dino_loss": moved(PublishedDINOLoss(K, 4, *SCHEDULE)).state_dict(),
        "fp16_scaler": torch.amp.GradScaler("cpu").state_dict(),  # type: ignore[attr-defined]
    }


def main_ibot() -> dict[str, Any]:
    """bytedance/ibot main_ibot.py: with BatchNorm both under DDP."""
    student, teacher = (
        moved(Parts(backbone=backbone(), head=PublishedIBOTHead(DIM, K, patch_out_dim=K2, **SIZES))) for _ in range(2)
    )
    return {
        "student": {f"module.{key}": value for key, value in student.state_dict().items()},
        "teacher": {f"module.{key}": value for key, value in teacher.state_dict().items()},
        "optimizer": trained(student).state_dict(),
        "epoch": 3,
        "args": command_line(),
        "ibot_loss": moved(PublishedIBOTLoss(K, K2, 2, 0, 0.04, 0.04, 0.04, 0.07, 2, 5)).state_dict(),
        "fp16_scaler": torch.amp.GradScaler("cpu").state_dict(),  # type: ignore[attr-defined]
    }


def dinov2_run() -> nn.Module:
    """facebookresearch/dinov2 SSLMetaArch: both networks and the losses are parts of one module."""
    networks = {}
    for name in ("student", "teacher"):
        heads = {f"{part}_head": PublishedV2Head(DIM, k, **SIZES) for part, k in (("dino", K), ("ibot", K2))}
        networks[name] = nn.ModuleDict({"backbone": backbone(), **heads})
    return moved(Parts(dino_loss=PublishedV2Loss(K), ibot_patch_loss=PublishedPatchLoss(K2), **networks))


def dinov2_file() -> dict[str, Any]:
    """Its checkpointer's file where FSDP does not shard."""
    run = dinov2_run()
    return {
        "model": run.state_dict(),
        "optimizer": trained(run.get_submodule("student")).state_dict(),
        "iteration": 1249,
    }


def lightning_file(state: STATE, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """lightning's Trainer.save_checkpoint, with the configuration as save_hyperparameters keeps one of omegaconf."""
    return {
        "epoch": 3,
        "global_step": np.int64(40),
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0), "dirpath": Path("x")}
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [np.float64(0.1)], "last_epoch": 4, "lr_lambdas": [None]}],
        "hparams_name": "cfg",
        "hyper_parameters": omegaconf.OmegaConf.create({"optimizer": {"lr": 0.1}, "method": "dino"}),
    }


def lightly_file() -> dict[str, Any]:
    """A module of lightly's example, whose keys are those of its attributes; its heads' are ours (tests of the drop-in)."""
    heads = {name: lightly.DINOProjectionHead(DIM, 16, 8, K) for name in ("student_head", "teacher_head")}
    parts = {"student_backbone": backbone(), "teacher_backbone": backbone(), "criterion": lightly.DINOLoss(K), **heads}
    module = moved(Parts(**parts))
    return lightning_file(module.state_dict(), trained(module.get_submodule("student_head")))


def solo_file() -> dict[str, Any]:
    parts = {"backbone": backbone(), "momentum_backbone": backbone(), "dino_loss_func": solo.DINOLoss(K, *SCHEDULE)}
    heads = {name: solo.DINOHead(DIM, K, hidden_dim=16, bottleneck_dim=8) for name in ("head", "momentum_head")}
    module = moved(Parts(**parts, **heads))
    return lightning_file(module.state_dict(), trained(module.get_submodule("head")))


def dino_parts() -> dict[str, nn.Module]:
    return {"backbone": backbone(), "head": dino.DINOHead(DIM, K, **SIZES), "loss": dino.DINOLoss(K, 4, *SCHEDULE)}


def ibot_parts() -> dict[str, nn.Module]:
    loss = ibot.iBOTLoss(K, K2, 2, 0, 0.04, 0.04, 0.04, 0.07, 2, 5)
    return {"backbone": backbone(), "head": ibot.iBOTHead(DIM, K, patch_out_dim=K2, **SIZES), "loss": loss}


def dinov2_parts() -> dict[str, nn.Module]:
    heads = {"dino_head": dinov2.DINOHead(DIM, K, **SIZES), "ibot_head": dinov2.DINOHead(DIM, K2, **SIZES)}
    losses = {"dino_loss": dinov2.DINOLoss(K), "ibot_patch_loss": dinov2.iBOTPatchLoss(K2)}
    return {"backbone": backbone(), **heads, **losses}


Load = Callable[[Any, str, dict[str, nn.Module]], None]
Place = Callable[[dict[str, Any], str, str], STATE]


def under(state: STATE, prefix: str) -> STATE:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def by_keywords(module: Any) -> Load:
    return lambda given, network, parts: module.load_checkpoint(given, network=network, **parts)


def by_names(module: Any, names: Callable[[str, str], str]) -> Load:
    def load(given: Any, network: str, parts: dict[str, nn.Module]) -> None:
        module.load_checkpoint(given, {names(network, name): part for name, part in parts.items()})

    return load


def in_entries(loss: str) -> Place:
    def place(file: dict[str, Any], network: str, part: str) -> STATE:
        state = {key.removeprefix("module."): value for key, value in file[network].items()}
        return dict(file[loss]) if part == "loss" else under(state, f"{part}.")

    return place


def in_a_run(file: dict[str, Any], network: str, part: str) -> STATE:
    return under(file["model"], f"{part}." if part.endswith("loss") else f"{network}.{part}.")


def in_lightning(names: Callable[[str, str], str]) -> Place:
    return lambda file, network, part: under(file["state_dict"], names(network, part) + ".")


def lightly_name(network: str, part: str) -> str:
    return "criterion" if part == "loss" else f"{network}_{part}"


def solo_name(network: str, part: str) -> str:
    return "dino_loss_func" if part == "loss" else part if network == "student" else f"momentum_{part}"


def lightly_parts() -> dict[str, nn.Module]:
    return {"backbone": backbone(), "head": lightly.DINOProjectionHead(DIM, 16, 8, K), "loss": lightly.DINOLoss(K)}


def solo_parts() -> dict[str, nn.Module]:
    head = solo.DINOHead(DIM, K, hidden_dim=16, bottleneck_dim=8)
    return {"backbone": backbone(), "head": head, "loss": solo.DINOLoss(K, *SCHEDULE)}


FORMATS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, nn.Module]], Load, Place]] = {
    "dino": (main_dino, dino_parts, by_keywords(dino), in_entries("dino_loss")),
    "ibot": (main_ibot, ibot_parts, by_keywords(ibot), in_entries("ibot_loss")),
    "dinov2": (dinov2_file, dinov2_parts, by_keywords(dinov2), in_a_run),
    "lightly": (lightly_file, lightly_parts, by_names(lightly, lightly_name), in_lightning(lightly_name)),
    "solo": (solo_file, solo_parts, by_names(solo, solo_name), in_lightning(solo_name)),
}


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
    unit = [nn.functional.normalize(v, dim=-1) for v in (layer.weight_v.detach(), expected["last_layer.weight_v"])]  # type: ignore[operator, union-attr]
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
