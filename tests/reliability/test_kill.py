"""kill -9 of one rank or of all at random moments, again and again: the run ends with the bits of one that nobody has killed.

``VMF_FAULTS=20 pytest tests/reliability/test_kill.py`` kills forty times.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.pretrain.engine.test_torchrun import one_rank, undisturbed
from tests.pretrain.tiny import yaml_of
from tests.reliability.runs import FAULTS, small_digits
from vmf_pretrain.storage.checkpoint import load_checkpoint
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

__all__ = ["undisturbed"]  # a fixture
KILLS = 2 * FAULTS
RANKS = 2
LONGEST = 120  # seconds from one start of the ranks to the next, on a busy machine
LATEST = 0.7  # of the time that a run takes from there to its end, so that few kills come too late
SEED = int.from_bytes(os.urandom(4), "little")  # another night, other moments; the message has it


def told(arguments: list[str], pids: str) -> None:
    """A rank that says which process it is."""
    name = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}_{os.environ['RANK']}"
    (Path(pids) / f".{name}").write_text(str(os.getpid()))
    (Path(pids) / f".{name}").replace(Path(pids) / name)
    one_rank(arguments, False)


def launch(folder: Path, out: Path, restarts: int) -> None:
    config = yaml_of(small_digits(data={"batch_size": 16}, train={"epochs": 4}), folder / f"{out.name}.yaml")
    (folder / f"{out.name}_pids").mkdir()
    chosen = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=restarts,
        start_method="forkserver",
    )
    words = ["fit", "--config", str(config), "--out", str(out)]
    elastic_launch(chosen, told)(words, str(folder / f"{out.name}_pids"))


class Killer(threading.Thread):
    """Kills ranks of each start of a run but the last, after a part of ``span`` seconds; ``steps`` says how far the run was."""

    def __init__(self, pids: Path, folder: RunFolder, span: float) -> None:
        super().__init__(daemon=True)
        self.pids, self.folder, self.span = pids, folder, span
        self.steps: list[int] = []

    def run(self) -> None:
        numbers = random.Random(SEED)
        for start in range(KILLS):
            paths = [self.pids / f"{start}_{rank}" for rank in range(RANKS)]
            until = time.monotonic() + LONGEST
            while not all(path.exists() for path in paths):
                if time.monotonic() > until:
                    return  # the run has ended before its turn to be killed
                time.sleep(0.02)
            time.sleep(numbers.uniform(0, self.span))
            self.steps.append(max((record.get("step", 0) for record in read_metrics(self.folder)), default=-1))
            for path in paths if numbers.random() < 0.5 else [numbers.choice(paths)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)


def ends(out: Path) -> tuple[dict[str, bytes], list[float]]:
    """The last checkpoint bit by bit, and all losses."""
    found = load_checkpoint(RunFolder(out).checkpoints)
    bits = {
        f"{group}.{name}": value.contiguous().numpy().tobytes()
        for group, named in found.tensors.items()
        for name, value in named.items()
    }
    return bits, [record["loss"] for record in read_metrics(RunFolder(out)) if "loss" in record]


def test_a_run_of_two_ranks_survives_being_killed_at_any_moment(tmp_path: Path) -> None:
    launch(tmp_path, tmp_path / "whole", 0)
    span = LATEST * (time.time() - (tmp_path / "whole_pids" / "0_0").stat().st_mtime)
    killer = Killer(tmp_path / "killed_pids", RunFolder(tmp_path / "killed"), span)
    killer.start()
    launch(tmp_path, tmp_path / "killed", KILLS)
    bits, losses = ends(tmp_path / "killed")
    expected, expected_losses = ends(tmp_path / "whole")
    at = f"seed {SEED}, killed at steps {killer.steps}"
    starts = {path.name.split("_")[0] for path in (tmp_path / "killed_pids").iterdir()}
    assert len(starts) > 1, f"nothing was killed in time ({at}): this shows nothing"
    assert bits.keys() == expected.keys()
    assert not [name for name in bits if bits[name] != expected[name]], at
    assert losses == expected_losses, at
