"""What a loader's worker process does about signals, and how it ends: with its parent, or when the parent says so."""

import errno
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

TOO_MANY_FILES = 73  # exit status of a worker that could not hand over a batch
ORPHAN_CHECK = 1.0  # seconds
ASK = getattr(
    signal, "SIGUSR1", signal.SIGINT
)  # asks the training process for a checkpoint; Windows has no such signal
SIGNALS = {signal.SIGINT, signal.SIGTERM, ASK}


@dataclass(frozen=True)
class WorkerStart:
    """Called in each worker when it starts.

    A terminal sends Ctrl-C, and a scheduler SIGTERM, to workers too. They must live until the training process has taken
    its last batch, so they ignore both, and SIGTERM ends them only once ``closing`` is set.

    Attributes:
        closing: one byte of shared memory without a lock, which a killed worker could hold for ever; 1 when workers are to end.
    """

    closing: Any

    def __call__(self, worker: int) -> None:
        """Set up the worker of that number."""
        parent = os.getppid()

        def end(number: int, frame: FrameType | None) -> None:
            if self.closing.value or _is_orphan(parent):
                os._exit(0)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(ASK, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        # the thread that hands batches over would print its error, drop the batch and leave the training process waiting
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]
        # so would the thread that hands over the open files of a batch, and try again for ever
        sys.excepthook = _give_up_without_files


@contextmanager
def held_signals(method: str) -> Iterator[None]:
    """Signals wait in this thread and in processes started here, which would die of them before they are ready.

    What multiprocessing starts by itself is started before. A server of forks would hold them for ever, and with it every
    process that is ever forked from it; the start of a tracker of resources would let them go.
    """
    if method == "forkserver":
        from multiprocessing import forkserver, resource_tracker  # not on every system

        resource_tracker.ensure_running()
        forkserver.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(parent: int) -> None:
    """End when the parent has: a worker may be waiting for a lock that nobody will release."""
    while not _is_orphan(parent):
        time.sleep(ORPHAN_CHECK)
    os._exit(0)


def _is_orphan(parent: int) -> bool:
    """Whether the training process has ended.

    A worker from a server of forks is that one's child, which lives on with it; multiprocessing knows who asked for it.
    Where processes are forked the others hold open what it looks at, and the parent says it.
    """
    asked = multiprocessing.parent_process()
    return os.getppid() != parent or not (asked is None or asked.is_alive())


def _give_up_without_files(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        os._exit(TOO_MANY_FILES)
    sys.__excepthook__(kind, error, trace)


def _give_up(error: Exception, batch: object) -> None:
    os._exit(TOO_MANY_FILES)
