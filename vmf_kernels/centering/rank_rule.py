"""The base of the rules in this folder: a backend for their sums, and the ranks that the sums include."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from vmf_kernels.backends.choice import check_backend_name
from vmf_kernels.ranks import RowRanks, Shared


class RankRule(nn.Module):
    """A rule over the rows of several ranks; deep copies share its groups.

    Args:
        backend: of passes over unstored logits, see ``choose_backend``.
        prototype_group: ranks over which the prototypes are split and that hold the same rows, or None.
        row_group: ranks whose rows form one batch; None means all ranks, or, with a prototype group, this rank only.

    Raises:
        ValueError: the backend is unknown, or there are ranks outside the prototype group and no row group is given.
    """

    over_probabilities = False

    def __init__(self, backend: str, prototype_group: ProcessGroup | None, row_group: ProcessGroup | None) -> None:
        super().__init__()
        check_backend_name(backend)
        self.backend = backend
        self._prototype_group = Shared(prototype_group)
        self._row_ranks = RowRanks.of(prototype_group, row_group)

    @property
    def prototype_group(self) -> ProcessGroup | None:
        """Ranks over which the prototypes are split."""
        return self._prototype_group.value
