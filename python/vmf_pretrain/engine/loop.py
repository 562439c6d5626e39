"""One step of any method: forward, backward, and an update that all ranks make or none.

A step whose loss or gradient is not finite is skipped on every rank: weights, optimizer, followers and buffers (centres, batch
statistics) keep their bits. On a CPU the loop knows at once. On a GPU the update is made conditional on the device, and the
host reads a step later, so that it never waits.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.randomness import INITIALISATION, TRAINING_STEP, stream_seed
from vmf_pretrain.engine.loss_scale import LossScale
from vmf_pretrain.engine.optim import clip_groups, gradients_of, parameter_groups, set_rates
from vmf_pretrain.engine.parallel import Wrapped, wrap
from vmf_pretrain.engine.votes import Counts, Taken, Votes
from vmf_pretrain.methods.method import MINIMISED, Method, Place
from vmf_pretrain.networks import ranks
from vmf_pretrain.schedules import CosineSchedule
from vmf_pretrain.storage.checkpoint import Checkpoint
from vmf_pretrain.storage.optimizer_state import flatten_optimizer, optimizer_targets, restore_optimizer
from vmf_pretrain.storage.sharded import load_into

OWN = "method"  # the group of tensors that stand directly in a method
RESERVED = {OWN, "optimizer", "loss_scale"}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": None}


class Loop:
    """A method with its optimizer and schedules.

    Args:
        config: the whole run.
        method: its class.
        steps_per_epoch: optimizer steps in an epoch.
        device: of this rank.
        begin: gives the method the weights that it starts from; None leaves it at its own.
        late: whether the host reads a step late; None means on a GPU only.

    Raises:
        PretrainError: the networks cannot be built.
    """

    def __init__(
        self,
        config: Config,
        method: type[Method],
        steps_per_epoch: int,
        device: torch.device,
        *,
        begin: Callable[[Method], None] | None = None,
        late: bool | None = None,
    ) -> None:
        torch.manual_seed(stream_seed(config.seed, INITIALISATION))
        self.config, self.device = config, device
        self.start = Place(0, steps_per_epoch, config.train.epochs)
        self.method = method(config, self.start)
        if begin is not None:
            begin(self.method)
        self.method.to(device)
        taken = RESERVED & {name for name, _ in self.method.named_children()}
        if taken:
            raise PretrainError(
                f"a part of {method.__name__} is called {taken.pop()}, as a checkpoint's file is; rename it."
            )
        if config.train.precision == "fp64":
            self.method.double()
        self.wrapped: Wrapped = wrap(self.method, config, device)
        self.late = device.type == "cuda" if late is None else late
        optim, peak = config.optim, config.optim.peak(config.data.batch_size)
        self._rests_by_rate = optim.freeze_last_layer_by == "rate"
        groups = parameter_groups(
            self.method,
            layer_decay=optim.layer_decay,
            patch_embed_rate=optim.patch_embed_rate,
            last_layer_apart=self._rests_by_rate,
        )
        fused = True if self.late else None
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=optim.betas, fused=fused)
        self.loss_scale = LossScale(active=config.train.precision == "fp16", device=device)
        self.votes = Votes(device, late=self.late)
        self._moved = False  # whether a step of this process has been taken, after which no buffer starts any more
        steps, warm_up = round(optim.stretch * self.start.steps), optim.warmup_epochs * steps_per_epoch
        self.learning_rate = CosineSchedule(
            peak,
            optim.final_learning_rate,
            steps,
            warm_up,
            first=optim.start_learning_rate,
            counting=optim.counting,
        )
        self.weight_decay = CosineSchedule(optim.weight_decay, optim.final_weight_decay, steps, counting=optim.counting)

    def place(self, step: int) -> Place:
        """The place of a step."""
        return Place(step, self.start.steps_per_epoch, self.start.epochs)

    def step(self, step: int, batch: Batch, *, log: bool = True, mine: Callable[[], Counts] = Counts) -> list[Taken]:
        """Take one optimizer step.

        Args:
            step: its number.
            batch: this rank's images, on any device.
            log: whether the numbers of this step are wanted.
            mine: returns what this rank votes besides; called when the step's gradients are there.

        Returns:
            What has become known: of this step, or on a GPU of the step before, if there was one.
        """
        place = self.place(step)
        # what is random in a step draws from the global generator; seeding it by the step makes saving its state unnecessary
        torch.manual_seed(stream_seed(self.config.seed, TRAINING_STEP, step))
        batch = batch.to(self.device, dtype=torch.float64 if self.config.train.precision == "fp64" else None)
        before = {name: value.clone() for name, value in self.method.named_buffers()}
        with self._autocast():
            losses: dict[str, Tensor] = self.wrapped(batch, place)
        total = losses[MINIMISED]
        self.optimizer.zero_grad(set_to_none=True)
        self.wrapped.backward(self.loss_scale.scaled(total))
        gradients = gradients_of(self.method, self.config.optim.clip_of)
        self.loss_scale.unscale([gradient for group in gradients for gradient in group])
        norm = clip_groups(gradients, self.config.optim.clip)
        finite = total.detach().isfinite() & norm.isfinite()
        skipped = self.votes.cast(mine(), finite, total.detach().isfinite())
        self._update(place, skipped, before)
        numbers: dict[str, Tensor] = {}
        if log:
            averaged = {name: ranks.averaged(value.detach()) for name, value in losses.items()}
            numbers = {**self.method.numbers(), **averaged, "gradient_norm": norm}
        return self.votes.keep(step, batch, numbers)

    def drain(self) -> list[Taken]:
        """What is not known yet; after the last step, or before a checkpoint."""
        return self.votes.drain()

    def rates(self, step: int) -> dict[str, float]:
        """The values of the schedules at a step."""
        own = {"learning_rate": self.learning_rate.at(step), "weight_decay": self.weight_decay.at(step)}
        return {**own, **self.method.rates(self.place(step))}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint has to hold: a group for each part of the method, and the optimizer's."""
        scale = {"loss_scale": self.loss_scale.state_dict()} if self.loss_scale.active else {}
        return {**self._groups(), **scale, "optimizer": flatten_optimizer(self.optimizer)}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of any number of ranks, sharded or not.

        Raises:
            PretrainError: its tensors do not fit this configuration; the error lists them.
        """
        targets = self.tensors()
        del targets["optimizer"]
        targets = {
            group: {name: torch.empty_like(tensor) for name, tensor in named.items()}
            for group, named in targets.items()
        }
        state = optimizer_targets(self.optimizer, checkpoint.tensors["optimizer"])
        load_into(checkpoint, {**targets, "optimizer": state})
        if "loss_scale" in targets:
            self.loss_scale.load_state_dict(targets.pop("loss_scale"))
        whole = targets.pop(OWN, {})
        whole |= {f"{group}.{name}": value for group, named in targets.items() for name, value in named.items()}
        self.method.load_state_dict(whole)
        restore_optimizer(self.optimizer, state)

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """The method's state: a group for each of its parts, and one for what stands directly in it."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in self.method.state_dict().items():
            part, _, inner = name.partition(".")
            group, key = (part, inner) if inner else (OWN, name)
            groups.setdefault(group, {})[key] = value
        return groups

    def _update(self, place: Place, skipped: Tensor, before: dict[str, Tensor]) -> None:
        """Optimizer, followers and buffers; nothing changes if the [] tensor ``skipped`` is not 0."""
        rests = self._rests_by_rate and place.epoch < self.config.optim.freeze_last_layer_epochs
        rate, decay = self.learning_rate.at(place.step), self.weight_decay.at(place.step)
        set_rates(self.optimizer, rate, decay, last_layer_rests=rests)
        self.method.adjust_gradients(place)
        self.loss_scale.update(skipped)
        if self.late and self._moved:
            self._keep_buffers(skipped, before)
            setattr(self.optimizer, "found_inf", skipped)  # noqa: B010 -- read by fused optimizers, unknown to their type
            self.optimizer.step()
            self.method.after_step(place, 1.0 - skipped)
        elif skipped.item():
            # through the modules, which may note on the host whether a buffer has started
            self.method.load_state_dict(before, strict=False)
        else:
            self._moved = True
            if self.late:
                setattr(self.optimizer, "found_inf", skipped)  # noqa: B010
            self.optimizer.step()
            self.method.after_step(place, 1.0)

    @torch.no_grad()
    def _keep_buffers(self, skipped: Tensor, before: dict[str, Tensor]) -> None:
        for name, value in self.method.named_buffers():
            value.copy_(torch.where(skipped > 0, before[name], value))

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = PRECISIONS[self.config.train.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield
