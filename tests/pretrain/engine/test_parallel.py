"""What the environment says about ranks, and how blocks are computed: none of it changes a result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.pretrain.tiny import batch_of, digits_config, loop_on
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.engine.parallel import choose_device, process_group, slurm_environment

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "71234"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("gpu[3,5-9]", "gpu3"),
        ("a1,gpu[3,5-9]", "a1"),
        ("rack-2-node[10-12]", "rack-2-node10"),
    ],
)
def test_variables_of_slurm_are_read(nodes: str, first: str) -> None:
    assert slurm_environment({**SLURM, "SLURM_JOB_NODELIST": nodes}) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": first,
        "MASTER_PORT": "29634",
    }


ALONE: list[dict[str, str]] = [
    {},
    {**SLURM, "RANK": "0"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    {"SLURM_STEP_NUM_TASKS": "8"},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a script of sbatch
]


@pytest.mark.quick
@pytest.mark.parametrize("environment", ALONE)
def test_torchrun_goes_before_slurm_and_a_single_task_is_alone(environment: dict[str, str]) -> None:
    assert slurm_environment(environment) == {}


@pytest.mark.quick
def test_half_an_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(PretrainError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        process_group("cpu"),
    ):
        pass


@pytest.mark.quick
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(PretrainError, match=r"device cuda cannot be used here"):
        choose_device("cuda")


def first_losses(**train: Any) -> list[float]:
    config = digits_config(data={"batch_size": 32}, backbone={"depth": 2, "drop_path": 0.2}, train=train)
    loop, batches = loop_on(config, 96)
    return [loop.step(step, batch_of(batches, step))[0].numbers["total"] for step in range(4)]


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return first_losses()


@pytest.mark.quick
def test_activation_checkpointing_changes_no_loss(plain: list[float]) -> None:
    assert first_losses(activation_checkpointing=True) == plain


def test_compiled_blocks_change_no_loss(plain: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def traced(block: nn.Module) -> None:
        """Compiled but for the last step, the compiler for C++, which is torch's own and takes a minute."""
        compiled.append(block)
        compile_module(block, backend="aot_eager")

    compile_module: Any = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", traced)
    assert first_losses(compile=True) == pytest.approx(plain, rel=1e-5)
    assert len(compiled) == 2 * 2, "the blocks of student and teacher"


@pytest.mark.parametrize(
    ("precision", "steps", "tolerance"),
    [("bf16", 4, 0.03), ("fp16", 1, 0.01), ("fp64", 4, 1e-4)],  # fp16 skips steps until its scale fits
)
def test_precisions_change_losses_by_their_rounding(
    precision: str, steps: int, tolerance: float, plain: list[float]
) -> None:
    found = first_losses(precision=precision)
    assert found[:steps] == pytest.approx(plain[:steps], rel=tolerance)
    assert all(map(math.isfinite, found))
    assert found != plain, "the precision changes nothing"
