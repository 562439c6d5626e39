"""What a run keeps on disk to go on from, and to load elsewhere."""

import functools
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed
from torch import Tensor

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.optim import whole_tensor
from vmf_pretrain.networks import ranks
from vmf_pretrain.storage.checkpoint import Checkpoint, outline_checkpoint, outline_of, save_checkpoint
from vmf_pretrain.storage.fingerprint import Fingerprint, config_changes, require_resumable
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.sharded import find_checkpoint, save_sharded
from vmf_pretrain.storage.weights import Weights
from vmf_pretrain.storage.writer import CheckpointWriter


class Keeping:
    """Checkpoints and weights of a run, written in the background. Every rank calls each method.

    Args:
        folder: of the run.
        config: the whole run.
        loop: whose state is kept.
        batches: of the run; its plan and length give step numbers their meaning.
        images: fingerprints of the images and of those held out.
        say: takes a sentence for a person.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        loop: Loop,
        batches: ViewBatches,
        images: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.config, self.loop, self.batches, self.images, self.say = (
            folder,
            config,
            loop,
            batches,
            images,
            say,
        )
        keep, self._group = config.train.keep_checkpoints, None
        save: Any = functools.partial(save_checkpoint, folder.checkpoints, keep=keep)
        if loop.wrapped.sharded:
            self._group = torch.distributed.new_group(backend="gloo")  # the thread that writes has a group of its own
            save = functools.partial(save_sharded, folder.checkpoints, keep=keep, group=self._group)
        self._writes = loop.wrapped.sharded or ranks.rank() == 0
        self.writer = CheckpointWriter(save, say)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    def checkpoint(self, step: int, facts: Mapping[str, Any], weights: str | None = None) -> None:
        """Write a checkpoint of this step, and its weights under a name."""
        state = {**facts, "fingerprint": self.fingerprint.plain(), "config": asdict(self.config)}
        exported = [] if weights is None else self._weights(weights, step, None)
        if self._writes:
            self.writer.save(step, self.loop.tensors(), state, exported)

    def weights(self, name: str, step: int, knn: float | None) -> None:
        """Write the exported module's weights."""
        for weights in self._weights(name, step, knn):
            self.writer.export(weights)

    def newest(self, allowed: Set[str]) -> Checkpoint:
        """The newest checkpoint, if the run may go on from it; says what has changed since.

        Raises:
            PretrainError: there is none, or it is of another run.
        """
        where = self.folder.checkpoints
        found = _first_finds(where) if self._group is None else find_checkpoint(where, self._group)
        before, steps = found.state.get("fingerprint"), len(self.batches)
        said = require_resumable(before, self.fingerprint, step=found.step, steps=steps, allowed=allowed)
        # a seed is part of the fingerprint and of the settings, and is said once
        for sentence in dict.fromkeys([*said, *config_changes(found.state.get("config"), asdict(self.config))]):
            self.say(sentence)
        return found

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What the step numbers of this run mean."""
        plan = self.batches.plan
        masks = None if plan.masks is None else repr(plan.masks)
        views = {"global": plan.global_views, "local": plan.local_views, "masks": masks, **asdict(self.config.views)}
        images = {name: value for name, value in self.images.items() if name != "held_out"}
        trained: dict[str, Tensor] = {
            name: parameter for name, parameter in self.loop.method.named_parameters() if parameter.requires_grad
        }
        return Fingerprint.of(
            network=trained,
            images=images,
            held_out=self.images.get("held_out"),
            batch=self.config.data.batch_size,
            views=views,
            seed=self.config.seed,
            method=self.config.method,
            optimizer=type(self.loop.optimizer).__name__,
        )

    def _weights(self, name: str, step: int, knn: float | None) -> list[Weights]:
        """What the first rank writes; the others only help it to get whole tensors."""
        whole = {key: whole_tensor(value.detach()) for key, value in self.loop.method.exported.state_dict().items()}
        if ranks.rank():
            return []
        facts = {"network": self.config.method, "step": step, "knn": knn, "config": asdict(self.config)}
        path: Path = self.folder.weights / f"{name}.safetensors"
        return [Weights(path, whole, network_input(self.config), facts)]


def _first_finds(where: Path) -> Checkpoint:
    """The newest whole checkpoint as the first rank sees it, on every rank: a shared disk may show ranks different ones."""
    found: list[Checkpoint] = []  # by the first rank, which need not read it again

    def look() -> str:
        found.append(outline_checkpoint(where))
        return found[0].path.name

    name = ranks.done_by_first(look)
    return found[0] if found else outline_of(where / name)
