"""Sinkhorn-Knopp targets as one bias: the dual vector of the prototypes, without the [rows, K] plan.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.centering.log_sums import LogSums
from vmf_kernels.centering.rank_rule import RankRule
from vmf_kernels.unstored.prototype_logits import PrototypeLogits


class SinkhornKnopp(RankRule):
    """Targets in which every prototype receives the same mass from the batch, up to the last normalisation of the rows.

    The published algorithm scales prototypes and rows of ``exp(l)`` alternately, prototypes first. In log space, starting
    from u = v = 0, a round is

        u_k = -log sum_b exp(l_bk + v_b),    v_b = -log sum_k exp(l_bk + u_k)

    The published constants 1/K and 1/B cancel. After the last round the target is ``softmax_k(l_bk + u_k)``: u is a bias like
    that of a centre, and nothing overflows at any norm. The result equals the published one; it would not if each row's
    maximum were subtracted from the argument of ``exp``. R may differ between ranks and be 0; ranks exchange K numbers per
    round.

    Args:
        iterations: rounds, at least 1; the published number is 3.
        backend: of passes over unstored logits, see ``choose_backend``. Stored logits are summed in plain torch.
        prototype_group: ranks over which the prototypes are split and which hold the same rows, or None.
        row_group: ranks whose rows form one batch; None means all ranks, or, with a prototype group, this rank only.

    Raises:
        ValueError: fewer than one iteration, or an unknown backend.
    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", NeurIPS 2020 (SwAV),
        section 3.1; Oquab et al., "DINOv2", TMLR 2024, section 4.

    Example:
        >>> teacher = torch.randn(64, 8)
        >>> bias = SinkhornKnopp(iterations=50)(teacher, temperature=1.0)
        >>> usage = (teacher + bias).softmax(dim=1).mean(dim=0)
        >>> torch.allclose(usage, torch.full((8,), 1 / 8), rtol=1e-2)
        True
    """

    def __init__(
        self,
        iterations: int = 3,
        *,
        backend: str = "auto",
        prototype_group: ProcessGroup | None = None,
        row_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(backend, prototype_group, row_group)
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; expected at least 1")
        self.iterations = iterations

    @torch.no_grad()
    def target_bias(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """[K] u, nats. Collective: every rank must call it, with any number of rows.

        Args:
            teacher: [..., K] raw teacher logits, not divided by the temperature.
            temperature: of the teacher, positive.
            bias: [K] nats that stored logits lack (the vMF log-normaliser), or None.

        Raises:
            ValueError: the temperature is not positive, or the bias does not have K elements.
        """
        rows = teacher.detach().flatten(0, -2)
        with LogSums(rows, temperature, bias, self.backend, self.prototype_group) as sums:
            dual_K = self._prototype_dual(sums, sums.new_offsets())
            for _ in range(self.iterations - 1):
                dual_K = self._prototype_dual(sums, sums.over_prototypes(dual_K))
        return dual_K

    forward = target_bias

    def begin(self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None) -> None:
        """Do nothing: batches are not recorded."""

    def accumulate(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor | None, bias: Tensor | None = None
    ) -> None:
        """Do nothing: batches are not recorded."""

    def apply_pending(self) -> None:
        """Do nothing: batches are not recorded."""

    def _prototype_dual(self, sums: LogSums, minus_v_R: Tensor) -> Tensor:
        total_K = self._row_ranks.log_sum_exp(sums.over_rows(minus_v_R))
        # without rows on any rank, any finite bias is valid
        return torch.where(total_K.isneginf(), 0.0, -total_K)
