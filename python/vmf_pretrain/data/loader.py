"""Batches in order from any step, prepared by worker processes; what goes wrong with those is one sentence, soon."""

import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.worker import TOO_MANY_FILES, WorkerStart, held_signals

PREFETCHED = 2  # batches that a worker prepares ahead
SHARED_MEMORY = Path("/dev/shm")
DYING = 2.0  # seconds between the end of a connection and that of its process
FILES_FREE = 64  # open files that a process needs besides those of batches
MIB = 2**20
LOWER = "lower data.workers, data.batch_size or views.local_count"


class Loading(Iterator[Batch]):
    """The iterator; its workers end with it."""

    def __init__(self, batches: ViewBatches, step: int) -> None:
        self._workers: list[BaseProcess] = []
        data = batches.config.data
        context = multiprocessing.get_context(data.start_method)
        closing: Any = context.RawValue("b", 0)
        loader: DataLoader[Batch | PretrainError] = DataLoader(
            batches,
            batch_size=None,
            sampler=range(step, len(batches)),
            num_workers=data.workers,
            multiprocessing_context=context if data.workers else None,
            worker_init_fn=WorkerStart(closing),
            prefetch_factor=PREFETCHED if data.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        before = set(multiprocessing.active_children())
        method = context.get_start_method()
        with _own_child_signal(), held_signals(method) if data.workers else contextlib.nullcontext():
            self._batches: Iterator[Batch | PretrainError] | None = iter(loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]
        self._end = weakref.finalize(self, _end_workers, self._workers, closing)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            found = next(self._batches)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            reason = self._reason(error)
            self.close()
            if reason is None:
                raise
            raise PretrainError(reason) from None
        if isinstance(found, PretrainError):
            self.close()
            raise found
        return found

    def close(self) -> None:
        """End the workers; there is no further batch."""
        self._end()
        self._batches = None

    def _reason(self, error: RuntimeError | OSError | EOFError) -> str | None:
        """One sentence on what happened to the workers, or None if it was something else."""
        if isinstance(error, EOFError | ConnectionError):  # the other end has died this moment
            ending = multiprocessing.connection.wait([worker.sentinel for worker in self._workers], DYING)
            for worker in self._workers:
                if worker.sentinel in ending:
                    worker.join(DYING)
        dead = [worker for worker in self._workers if worker.exitcode not in (None, 0)]
        if dead:
            return _death(dead[0])
        text = str(error)
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
            return _too_many_files()
        if "ancdata" in text:  # how a limit of open files shows where a batch is received
            return _too_many_files()
        return f"a worker of the data loader has ended ({text})." if "DataLoader worker" in text else None


def load_from(batches: ViewBatches, step: int) -> Loading:
    """The batches from ``step`` to the end of the run, in order. Close it, or delete it, to end its workers.

    Raises:
        PretrainError: too little shared memory or too few open files for the workers (at once); when a batch is asked for:
            a worker has died, a batch's images cannot be read, or too many files are open.
    """
    if batches.config.data.workers:
        require_importable_main(batches)
        require_shared_memory(batches)
        require_open_files(batches)
    return Loading(batches, step)


def _end_workers(workers: list[BaseProcess], closing: Any) -> None:
    closing.value = 1
    for worker in workers:
        if worker.is_alive():
            worker.terminate()


def _death(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    who = f"worker {worker.pid} of the data loader"
    if code == TOO_MANY_FILES:
        return _too_many_files()
    if code == -signal.SIGBUS:
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
        return f"{who} ran out of shared memory ({free / MIB:.0f} MiB are free in {SHARED_MEMORY}); {LOWER}."
    if code == -signal.SIGKILL:
        return f"{who} was killed (SIGKILL), as the system does when memory runs out; {LOWER}, and go on with --resume."
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"{who} has died ({name}); go on with --resume, or set data.workers to 0 to see where."


def _too_many_files() -> str:
    return f"too many files are open, {_file_limit()} at most; raise the limit (ulimit -n) or {LOWER}."


def require_importable_main(batches: ViewBatches) -> None:
    """Raise PretrainError if workers that are not forked would have to import a program that was typed in."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    typed = path is not None and not os.path.exists(path)  # such as <stdin>
    if batches.config.data.start_method != "fork" and typed:
        raise PretrainError(
            f"data.start_method {batches.config.data.start_method} starts workers that import the program, but it was read "
            f"from {path}; save it as a file, or use fork or data.workers 0."
        )


def require_shared_memory(batches: ViewBatches) -> None:
    """Raise PretrainError if the batches of the workers do not fit into what is free: they would wait or die in silence."""
    if not SHARED_MEMORY.is_dir():
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine
    needed = ranks * (batches.config.data.workers * PREFETCHED + 1) * batches.bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise PretrainError(
            f"{ranks * batches.config.data.workers} workers need {needed / MIB:.0f} MiB of shared memory but {free / MIB:.0f} "
            f"MiB are free in {SHARED_MEMORY}; make it larger (Docker: --shm-size) or {LOWER}."
        )


def require_open_files(batches: ViewBatches) -> None:
    """Raise PretrainError if the limit of open files is too low: each tensor of a waiting batch is an open file."""
    limit = _file_limit()
    # a worker has those of its own batches open twice while it hands them over
    held = (max(2, batches.config.data.workers) * PREFETCHED + 1) * len(batches.sides) + FILES_FREE
    if limit is not None and held > limit:
        raise PretrainError(
            f"{batches.config.data.workers} workers need {held} open files but the limit is {limit}; raise it (ulimit -n "
            f"{held}) or {LOWER}."
        )


def _file_limit() -> int | None:
    """The largest number of open files, or None where there is no such limit."""
    if os.name != "posix":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


@contextlib.contextmanager
def _own_child_signal() -> Iterator[None]:
    """Undo torch's handler of SIGCHLD, which raises wherever the training process is; ``__next__`` looks at the workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
