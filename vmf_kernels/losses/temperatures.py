"""The teacher's temperature in each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def temperature_schedule(
    warmup: float, final: float, warmup_epochs: int, epochs: int, first: int = 0, name: str = "teacher_temp"
) -> list[float]:
    """Teacher temperature of each epoch: a linear warm-up from epoch ``first``, whose last epoch has the final value.

    ``name`` is the name of the argument ``final`` in error messages.

    Raises:
        ValueError: a temperature is not positive, or the run is shorter than the warm-up or than one epoch.
    """
    for argument, value in ((f"warmup_{name}", warmup), (name, final)):
        check_positive(value, argument)
    if epochs < max(first + warmup_epochs, 1):
        raise ValueError(
            f"nepochs is {epochs} and warmup_teacher_temp_epochs {warmup_epochs}"
            f"{f', from epoch {first} on' if first else ''}; expected nepochs of at least 1 and at least the warm-up"
        )
    warm_up: list[float] = np.linspace(warmup, final, warmup_epochs).tolist()
    return [warmup] * first + warm_up + [final] * (epochs - first - warmup_epochs)


class EpochTemperatures(nn.Module):
    """The temperature of each epoch, as a number; in a compiled step, where a number would be a constant, as a tensor.

    Args:
        values: one for each epoch, as from ``temperature_schedule``.
    """

    stored: Tensor

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values
        # never on the meta device, because no checkpoint would fill it
        default = torch.get_default_device()
        device = torch.device("cpu") if default.type == "meta" else default
        self.register_buffer("stored", torch.tensor(values, dtype=torch.float64, device=device), persistent=False)

    @property
    def array(self) -> NDArray[np.float64]:
        """[epochs] a read-only array; use ``assign`` to change the values."""
        array = np.array(self.values)
        array.flags.writeable = False
        return array

    def assign(self, values: Sequence[float] | NDArray[Any] | Tensor, name: str) -> None:
        """Set other values, one for each epoch; ``name`` is the name of the schedule in error messages.

        Raises:
            ValueError: they are not a row of positive numbers.
        """
        given = np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=np.float64)
        if given.ndim != 1 or given.size == 0 or not (given > 0).all():
            raise ValueError(
                f"{name} is assigned {given.size} values of shape {given.shape}"
                f"{f' down to {given.min()}' if given.size else ''}; expected one number > 0 for each epoch"
            )
        self.values = given.tolist()
        self.stored = torch.tensor(self.values, dtype=torch.float64, device=self.stored.device)

    def forward(self, epoch: int | Tensor) -> float | Tensor:
        """The epoch's temperature: a number; for a tensor, or in a compiled step, a [] fp64 tensor on the module's device.

        Args:
            epoch: from 0. A tensor ([] int64 on that device) is not checked, because that would wait for the device.

        Raises:
            ValueError: the epoch is beyond the run.
        """
        if isinstance(epoch, Tensor):
            return self.stored.take(epoch)
        if isinstance(epoch, float):
            raise ValueError(f"epoch is {epoch}; expected an int")
        if not 0 <= epoch < len(self.values):
            raise ValueError(f"epoch is {epoch}; expected 0 to {len(self.values) - 1}, the run's nepochs")
        return self.stored[epoch] if torch.compiler.is_compiling() else self.values[epoch]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # follow only the device: loss.half() must not round temperatures, and to_empty() must not lose them
        self.stored = torch.tensor(self.values, dtype=torch.float64, device=self.stored.device)
        return self


def check_positive(value: float, name: str) -> None:
    """Raise ValueError unless a temperature is positive."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; expected a number > 0")
