"""Checkpoints and weights written in the background: the training step waits for a copy to host memory, not for the disk."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.checkpoint import Groups
from vmf_pretrain.storage.host_copy import HostCopies
from vmf_pretrain.storage.tolerant import warn
from vmf_pretrain.storage.weights import Weights, save_weights

Save = Callable[[int, Groups, Mapping[str, Any]], Path]
EXPORTED = "weights of "  # in front of a path: the copies of weights have a group of their own


class CheckpointWriter:
    """Writes one checkpoint at a time; a save waits until the one before is on disk.

    What goes wrong on the disk is said and counted, and training goes on; a mistake of the program is raised by the call that
    finds it next.

    Args:
        save: writes a checkpoint from (step, tensors, state): ``save_checkpoint`` or ``save_sharded`` with the rest bound.
        say: takes a sentence for each save that failed.

    Attributes:
        saved: step of the newest checkpoint that this writer has brought to the disk whole, or None.
        failures: the sentences that were said.
        held: seconds that the last call of ``save`` or ``export`` took, in all.
        waited: those of them in which it waited for the one before.
        wrote: seconds that the thread took for the last one.
    """

    def __init__(self, save: Save, say: Callable[[str], None] = warn) -> None:
        self._save, self._say = save, say
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[list[str]] | None = None
        self.saved: int | None = None
        self.failures: list[str] = []
        self.held = self.waited = self.wrote = 0.0

    def save(self, step: int, tensors: Groups, state: Mapping[str, Any], weights: Sequence[Weights] = ()) -> None:
        """Copy everything to host memory and return; a thread writes the checkpoint, then the weights.

        Args:
            step: optimizer steps done.
            tensors: by group, then by name. Those that occur in ``weights`` too are copied once.
            state: anything that JSON can hold; later changes to it are not seen.
            weights: of the same step.

        Raises:
            TypeError: JSON cannot hold the state.
        """
        kept: Mapping[str, Any] = json.loads(json.dumps(state))
        self._start(step, tensors, kept, weights)

    def export(self, weights: Weights) -> None:
        """As ``save``, for weights alone."""
        self._start(None, {}, {}, [weights])

    def check(self) -> None:
        """Say what went wrong, if the thread has finished; never waits."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is on disk or has failed."""
        if self._running is None:
            return
        running, self._running = self._running, None
        for failure in running.result():
            self.failures.append(failure)
            self._say(failure)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)
        self.wait()

    def _start(self, step: int | None, tensors: Groups, state: Mapping[str, Any], weights: Sequence[Weights]) -> None:
        began = time.perf_counter()
        self.wait()
        self.waited = time.perf_counter() - began
        exported = {f"{EXPORTED}{each.path}": each.tensors for each in weights}
        copies = self._copies.copy({**tensors, **exported})
        copied = [replace(each, tensors=copies.pop(f"{EXPORTED}{each.path}")) for each in weights]
        self._running = self._thread.submit(self._write, step, copies, state, copied)
        self.held = time.perf_counter() - began

    def _write(
        self, step: int | None, tensors: Groups, state: Mapping[str, Any], weights: Sequence[Weights]
    ) -> list[str]:
        """Write all of it; returns a sentence for each file or folder that could not be written."""
        began = time.perf_counter()
        failures = []
        self._copies.wait()
        if step is not None:
            try:
                self._save(step, tensors, state)
                self.saved = step
            except PretrainError as error:
                failures.append(f"{str(error).rstrip('.')}; checkpoints of before, if there are any, are intact.")
        for each in weights:
            try:
                save_weights(each)
            except OSError as error:
                reason = error.strerror or error
                failures.append(f"Weights {each.path} could not be written: {reason}.")
        self.wrote = time.perf_counter() - began
        return failures
