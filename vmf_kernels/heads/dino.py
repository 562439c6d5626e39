"""DINO's projection head.

Legend: R rows, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from vmf_kernels.heads.mlp import check_head_dims, projection_mlp, reset_children, unit_rows
from vmf_kernels.heads.prototype_layer import PrototypeLayer, is_fsdp_unit, outlive
from vmf_kernels.unstored.prototype_logits import PrototypeLogits


class DINOHead(nn.Module):
    """DINO's head: MLP, L2-normalised bottleneck, weight-normed prototypes; it returns unstored logits.

    Constructor, parameter names and initialisation are those of the published class, so its checkpoints load. Unlike that
    class, the module can be deep-copied.

    Args:
        in_dim: dim of the backbone's features.
        out_dim: number of prototypes K.
        use_bn: BatchNorm after each hidden layer.
        norm_last_layer: freeze the prototypes' norms at 1. DINO-vMF needs False.
        nlayers: layers of the MLP, at least 1.
        hidden_dim: width of its hidden layers.
        bottleneck_dim: D.

    Raises:
        ValueError: a dim is below 1, or ``bottleneck_dim`` below 2.
    Source: Caron et al., ICCV 2021, "Projection head" in section 3.2.

    Example:
        >>> head = DINOHead(in_dim=8, out_dim=512, hidden_dim=16, bottleneck_dim=4)
        >>> logits = head(torch.randn(3, 8))
        >>> type(logits).__name__, tuple(logits.shape)
        ('PrototypeLogits', (3, 512))
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        check_head_dims(in_dim, out_dim, hidden_dim, bottleneck_dim)
        self.mlp = projection_mlp(in_dim, hidden_dim, bottleneck_dim, nlayers, use_bn=use_bn)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, frozen_norm=norm_last_layer)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer as the constructor does."""
        reset_children(self)

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[R, in_dim] features to [R, K] logits, in the dtype autocast gives the MLP."""
        logits: PrototypeLogits = self.last_layer(unit_rows(self.mlp(x)))
        return logits if is_fsdp_unit(self.last_layer) else outlive(self, logits)


class DINOvMFHead(DINOHead):
    """DINO-vMF's head: its prototypes are von Mises-Fisher components of precision ``||w_k|| / tau``, so their norms are free.

    Its logits carry this: every loss, and ``prototype_cross_entropy``, adds ``log C_D(||w_k|| / tau)`` at its temperature.
    Stored logits (``materialize()``) do not: the normaliser depends on a temperature that they do not have.
    Parameters and checkpoints are those of ``DINOHead``. Arguments and errors as there, without ``norm_last_layer``.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939), section 4.

    Example:
        >>> head = DINOvMFHead(in_dim=8, out_dim=512, hidden_dim=16, bottleneck_dim=4)
        >>> head(torch.randn(3, 8)).prototypes.has_normalizer, head.last_layer.weight_g.requires_grad
        (True, True)
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        *,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__(in_dim, out_dim, use_bn, False, nlayers, hidden_dim, bottleneck_dim)

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[R, in_dim] features to [R, K] logits, in the dtype autocast gives the MLP."""
        return super().forward(x).with_vmf()
