"""MAE and I-JEPA on two ranks, under DDP and sharded: the numbers of one process, also of the masks and what is logged."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.on_ranks import start_ranks
from tests.pretrain.methods.masked_runs import masked_config
from tests.pretrain.tiny import batch_of, numbers_of, some_digits
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks

METHODS = ("mae", "ijepa")
WAYS = ("ddp", "fsdp")
STEPS = 4
DEPTH = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.3}


def numbers(method: str, way: str) -> list[dict[str, float]]:
    train = {"epochs": 2, "parallel": way}
    config = masked_config(method, data={"batch_size": 32}, train=train, backbone=DEPTH)
    chosen = method_class(config)
    batches = ViewBatches(some_digits(64), config, chosen.plan(config), ranks.rank(), ranks.count())
    loop = Loop(config, chosen, batches.steps_per_epoch, torch.device("cpu"))
    return [numbers_of(loop, step, batch_of(batches, step)) for step in range(STEPS)]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {f"{method} {way}": numbers(method, way) for method in METHODS for way in WAYS}
    if rank == 0:
        Path(folder, "numbers.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    start_ranks(run_rank, (str(tmp_path),), 2)
    found = json.loads((tmp_path / "numbers.json").read_text())
    for method in METHODS:
        alone = numbers(method, "ddp")
        for way in WAYS:
            for step, (got, expected) in enumerate(zip(found[f"{method} {way}"], alone, strict=True)):
                for name, value in expected.items():
                    off = abs(got[name] - value) / max(1e-3, abs(value))
                    assert off < 1e-5, f"{method}, {way}, step {step}: {name} is {got[name]:.8f} instead of {value:.8f}"
