"""The interface of a centring rule, which makes a teacher's targets for a loss.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.unstored.prototype_logits import PrototypeLogits


class CenteringRule(Protocol):
    """A centring rule: the target is ``softmax(logits / temperature + target_bias)``, with one bias for each prototype.

    Every loss takes any object with these attributes and methods as ``centering=``. An ``nn.Module`` becomes a submodule of the
    loss. A class that inherits from this one only has to define ``target_bias``; if it is also a module, ``nn.Module`` comes
    first among its bases. Every loss, and each of iBOT's two streams, needs a rule of its own, because it moves the rule.

    A loss passes detached logits. A rank may have no rows; if a rule reduces over ranks, this rank must still take part.

    Attributes:
        prototype_group: ranks over which the prototypes are split; None if each rank has all of them.
        over_probabilities: whether ``accumulate`` depends on the temperature and the bias, as a mean of probabilities does.

    Example:
        >>> import torch
        >>> from vmf_kernels import CenteringRule, DINOLoss
        >>> class NoCentering(CenteringRule):
        ...     def target_bias(self, teacher, temperature, bias=None):
        ...         return teacher.new_zeros(teacher.shape[-1])
        >>> loss = DINOLoss(8, 2, 0.04, 0.04, 0, 1, centering=NoCentering())
        >>> loss(torch.zeros(4, 8), torch.zeros(4, 8), epoch=0)  # two uniform distributions over 8 prototypes: log 8 nats
        tensor(2.0794)
    """

    over_probabilities: bool = False

    @property
    def prototype_group(self) -> ProcessGroup | None:
        """Ranks over which the prototypes are split."""
        return None

    def begin(self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None) -> None:
        """Start from this batch, if the rule has not started; arguments as ``target_bias``."""
        return

    @abstractmethod
    def target_bias(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """[K] nats to add to this batch's logits over temperature.

        Args:
            teacher: [..., K] raw teacher logits, not divided by the temperature.
            temperature: of the teacher, positive.
            bias: [K] nats that stored logits lack (the vMF log-normaliser), or None.

        Returns:
            Floating point, K elements, on the logits' device, without a gradient, the same on all ranks.
        """

    def accumulate(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor | None, bias: Tensor | None = None
    ) -> None:
        """Record a batch after its use, without changing the next bias.

        Arguments as ``target_bias``. The temperature may be None; only a rule with ``over_probabilities`` must raise then. With
        masked patches, the rows are those for the centre: all patches or the masked ones.
        """
        return

    def apply_pending(self) -> None:
        """Update the next bias with the recorded batches."""
        return
