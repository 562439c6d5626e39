"""What befalls the workers of a loader is one sentence, soon; and they end when the loader does, not before."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.data.photo_files import photos
from tests.pretrain.tiny import (
    batches_over,
    changed,
    digits_config,
    one_sentence,
    photos_config,
    save_photos,
    some_digits,
)
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data import waiting
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.loader import _death, load_from
from vmf_pretrain.data.waiting import Waiting
from vmf_pretrain.data.worker import TOO_MANY_FILES

ROOT = Path(__file__).parents[3]

SOON = 10.0  # seconds
Usage = namedtuple("Usage", "free")


def batches_of(workers: int = 2, **data: Any) -> ViewBatches:
    """50 batches of 4 digits."""
    return batches_over(
        some_digits(20), digits_config(data={"batch_size": 4, "workers": workers, **data}, train={"epochs": 10})
    )


def started(batches: ViewBatches) -> tuple[Iterator[Batch], list[BaseProcess]]:
    """A loader whose workers have given a few batches, and those workers."""
    others = set(multiprocessing.active_children())
    loading = load_from(batches, 0)
    for _ in range(4):
        next(loading)
    return loading, [child for child in multiprocessing.active_children() if child not in others]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_way_workers_start_changes_no_batch(method: str) -> None:
    first = next(load_from(batches_of(0), 7))
    other = next(load_from(batches_of(1, start_method=method), 7))
    assert all(torch.equal(a, b) for a, b in zip(first.views, other.views, strict=True))


@pytest.mark.quick
def test_workers_outlive_the_signals_that_a_terminal_or_scheduler_sends_them() -> None:
    loading, workers = started(batches_of())
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(int(str(worker.pid)), number)
    time.sleep(0.2)
    assert [worker.exitcode for worker in workers] == [None, None]
    assert len(list(loading)) == 46


@pytest.mark.quick
@pytest.mark.parametrize("end", ["closed", "deleted"])
def test_workers_end_at_once_with_their_loader(end: str) -> None:
    loading, workers = started(batches_of())
    begun = time.perf_counter()
    if end == "closed":
        loading.close()  # type: ignore[attr-defined]
        assert list(loading) == []
    del loading
    for worker in workers:
        worker.join(SOON)
    assert time.perf_counter() - begun < SOON / 2
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_killed_worker_is_one_sentence_soon() -> None:
    loading, workers = started(batches_of())
    begun = time.perf_counter()
    os.kill(int(str(workers[0].pid)), signal.SIGKILL)
    with pytest.raises(PretrainError, match=r"was killed \(SIGKILL\)") as caught:
        list(loading)
    assert one_sentence(str(caught.value)), str(caught.value)
    for worker in workers:
        worker.join(SOON)
    assert time.perf_counter() - begun < SOON
    assert all(worker.exitcode is not None for worker in workers), "a worker lives on"


# without the engine, whose import takes longer than the test
IMPORTS = """
import multiprocessing, os, signal, time, torch
from multiprocessing import resource_tracker
from vmf_pretrain.config.backbone import BackboneConfig
from vmf_pretrain.config.data import DataConfig
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.views import ViewsConfig
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.bundled import DigitImages
from vmf_pretrain.data.loader import load_from
from vmf_pretrain.data.plan import Plan

def loading_of(**data):
    data = DataConfig("digits", batch_size=4, **data)
    config = Config(data=data, views=ViewsConfig(16, 8, 1), backbone=BackboneConfig(patch_size=8))
    images = DigitImages(torch.rand(1000, 16, 16), torch.zeros(1000, 2), torch.zeros(1000))
    return load_from(ViewBatches(images, config, Plan()), 0)
"""
# the server of forks is started by the loader here, and then serves another; its worker is no child of the program's
SERVER = (
    IMPORTS
    + """
if __name__ == "__main__":
    resource_tracker.ensure_running()  # or its start lets go of what the loader holds
    loading = loading_of(start_method="forkserver", workers=1)
    next(loading)
    (worker,) = multiprocessing.active_children()
    child = multiprocessing.get_context("forkserver").Process(target=signal.pause)
    child.start()
    child.terminate()
    child.join(10)
    print(child.exitcode, worker.pid, flush=True)
    child.kill()
    os.kill(os.getpid(), signal.SIGKILL)
"""
)


def test_a_server_of_forks_holds_no_signal_for_ever_and_its_worker_does_not_outlive_the_training(
    tmp_path: Path,
) -> None:
    (tmp_path / "program.py").write_text(SERVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    exitcode, worker = map(int, done.stdout.split())
    assert exitcode == -signal.SIGTERM
    assert not still_running([worker], time.perf_counter() + SOON)


PROGRAM = (
    IMPORTS
    + """
loading = loading_of()
next(loading), next(loading), next(loading)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
{then}
"""
)
ENDINGS = {
    # the lock of the queue is with the dead, as after a kill in the middle of handing over: workers wait for it for ever
    "an error while a lock is lost": "loading._batches._worker_result_queue._wlock.acquire(); time.sleep(1); raise ValueError",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_worker_outlives_the_training_process_nor_holds_it_up(ending: str) -> None:
    code = PROGRAM.replace("{then}", ENDINGS[ending])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.wait(3 * SOON)  # torch waits five seconds for a worker before it ends it
    begun = time.perf_counter()
    assert len(pids) == 2
    assert not still_running(pids, begun + SOON)


def still_running(pids: list[int], end: float) -> list[int]:
    """Those of the processes that live on at a time of ``perf_counter``."""
    while (alive := [pid for pid in pids if is_running(pid)]) and time.perf_counter() < end:
        time.sleep(0.1)
    return alive


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.quick
def test_too_little_shared_memory_is_told_before_anything_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_over(some_digits(256), digits_config(data={"workers": 3}))
    needed = (3 * 2 + 1) * 256 * (2 * 16**2 + 8**2) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    with pytest.raises(PretrainError, match=r"3 workers need 4 MiB of shared memory but 4 MiB are free") as caught:
        load_from(batches, 0)
    assert one_sentence(str(caught.value))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed))
    assert len(next(load_from(batches, 0)).views) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0))
    alone = changed(batches.config, data={"workers": 0})
    assert len(next(load_from(batches_over(batches.images, alone), 0)).views) == 3


@pytest.mark.quick
def test_too_few_open_files_are_told_before_anything_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (70, 4096))
    with pytest.raises(PretrainError, match="2 workers need 79 open files but the limit is 70") as caught:
        load_from(batches_of(), 0)
    assert one_sentence(str(caught.value))


@pytest.mark.quick
@pytest.mark.thorough
def test_too_many_open_files_in_a_worker_are_one_sentence_and_no_bad_image(tmp_path: Path) -> None:
    """Both what opens an image and what hands a batch over fail where the limit is reached."""
    config = photos_config(tmp_path, data={"batch_size": 2, "workers": 1}, train={"epochs": 9})
    loading = load_from(batches_over(photos(*save_photos(tmp_path, 4)), config), 0)
    next(loading)
    (worker,) = loading._workers
    assert worker.pid is not None
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (4, 4))
    begun = time.perf_counter()
    with pytest.raises(PretrainError, match=r"(?i)too many (open )?files") as caught:
        list(loading)
    assert one_sentence(str(caught.value)), str(caught.value)
    assert time.perf_counter() - begun < SOON


class Dead:
    def __init__(self, code: int) -> None:
        self.exitcode, self.pid = code, 12


@pytest.mark.quick
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGBUS, "shared memory"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (TOO_MANY_FILES, "too many files are open"),
        (1, "exit status 1"),
    ],
)
def test_each_way_to_die_has_its_sentence(code: int, said: str) -> None:
    text = _death(Dead(code))  # type: ignore[arg-type]
    assert said in text
    assert one_sentence(text)


@pytest.mark.quick
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_limit_of_the_process_is_no_bad_image(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(*save_photos(tmp_path, 1))

    def refused(index: int) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(images.source, "read", refused)
    with pytest.raises(PretrainError, match="ulimit"):
        images.decode(0)


@pytest.mark.quick
def test_waiting_is_the_share_of_the_time_and_gives_advice_above_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def items() -> Iterator[int]:
        for number in range(4):
            now[0] += 1.0  # a second for each
            yield number

    timed = Waiting(items(), clock=lambda: now[0])
    next(timed)
    now[0] += 4.0
    assert (timed.share, timed.advice) == (0.2, None)
    next(timed)
    assert timed.share == pytest.approx(1 / 3)
    assert timed.advice == f"33% of the time is spent waiting for data; {waiting.ADVICE}."
    timed.restart()
    now[0] += 9.0
    next(timed)
    assert timed.share == pytest.approx(0.1)
    assert len(list(timed)) == 1
