"""lightly's DINO heads, for ``compat.lightly``.

Legend: R rows, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from vmf_kernels.heads.mlp import init_linears, reset_children, unit_rows
from vmf_kernels.heads.prototype_layer import PrototypeLayer, outlive
from vmf_kernels.unstored.prototype_logits import PrototypeLogits


class DINOv2ProjectionHead(nn.Module):
    """lightly's ``DINOv2ProjectionHead`` with logits that are never stored; unlike lightly's, it can be deep-copied.

    Args:
        input_dim: dim of the backbone's features.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: D.
        output_dim: K.
        batch_norm: BatchNorm after each hidden layer, which then has no bias.

    Raises:
        ValueError: a dim is below 1, or ``bottleneck_dim`` below 2.
    Source: lightly-ai/lightly lightly/models/modules/heads.py.

    Example:
        >>> head = DINOv2ProjectionHead(8, 16, 4, output_dim=512)
        >>> tuple(head(torch.randn(3, 8)).shape)
        (3, 512)
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if min(input_dim, hidden_dim, output_dim) < 1 or bottleneck_dim < 2:
            raise ValueError(
                f"input_dim, hidden_dim, bottleneck_dim, output_dim are {input_dim}, {hidden_dim}, {bottleneck_dim}, "
                f"{output_dim}; expected at least 1, 1, 2 and 1"
            )
        layers: list[nn.Module] = []
        for width in (input_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim, bias=not batch_norm))
            layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if batch_norm else [nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        init_linears(self.layers)
        self.last_layer = PrototypeLayer(bottleneck_dim, output_dim)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer as the constructor does."""
        reset_children(self)

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[R, input_dim] features to [R, K] logits, in the dtype autocast gives the MLP."""
        return outlive(self, self.last_layer(unit_rows(self.layers(x))))


class DINOProjectionHead(DINOv2ProjectionHead):
    """lightly's ``DINOProjectionHead``: the same, with norms and, at first, a last layer that may be frozen.

    Args:
        input_dim, hidden_dim, bottleneck_dim, output_dim, batch_norm: as ``DINOv2ProjectionHead``, which lists the errors.
        freeze_last_layer: epochs during which ``cancel_last_layer_gradients`` acts.
        norm_last_layer: freeze the prototypes' norms at 1.

    Source: lightly-ai/lightly lightly/models/modules/heads.py.

    Example:
        >>> head = DINOProjectionHead(8, 16, 4, output_dim=512, freeze_last_layer=1)
        >>> head(torch.randn(3, 8)).sum().backward()
        >>> head.cancel_last_layer_gradients(current_epoch=0)
        >>> head.last_layer.weight_v.grad is None
        True
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
        freeze_last_layer: int = -1,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__(input_dim, hidden_dim, bottleneck_dim, output_dim, batch_norm)
        self.freeze_last_layer = freeze_last_layer
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Remove the prototypes' gradients before epoch ``freeze_last_layer``; call between backward and optimiser step."""
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None  # not 0: with zeros, the optimiser would still decay weights and moments
