"""The projection head."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class HeadConfig:
    """The projection head and its prototypes.

    Attributes:
        prototypes: number of prototypes K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension D in which prototypes are compared.
        layers: linear layers before the prototypes.
        batch_norm: put batch normalisation after each hidden layer; small backbones need it.
        norm_prototypes: keep every prototype at norm 1; null means true for dino and ibot, and false for dinov2 and where
            the norms are the concentrations (-vmf).
        last_layer: "weight_norm", or "linear" for prototypes without a norm of their own (DINOv3).
        patches: for ibot and dinov2, what the head of the patches shares with that of the class tokens: "shared" is one head
            for both, "own_prototypes" has prototypes of its own after the same layers (iBOT), "own_head" layers too (DINOv2).
        patch_prototypes: number of prototypes of the patches; null means as many. A shared head has one number.
        patch_hidden_dim: width of the hidden layers of the patches' own head; null means that of the class tokens'.
        patch_bottleneck_dim: dimension of the patches' own prototypes; null means that of the class tokens'.
    """

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    batch_norm: bool = False
    norm_prototypes: bool | None = None
    last_layer: Literal["weight_norm", "linear"] = "weight_norm"
    patches: Literal["shared", "own_prototypes", "own_head"] = "shared"
    patch_prototypes: int | None = None
    patch_hidden_dim: int | None = None
    patch_bottleneck_dim: int | None = None

    def __post_init__(self) -> None:
        require_positive("head", hidden_dim=self.hidden_dim, layers=self.layers)
        require(self.bottleneck_dim >= 2, f"head.bottleneck_dim is {self.bottleneck_dim} but at least 2 are needed.")
        require(self.prototypes >= 2, f"head.prototypes is {self.prototypes} but at least 2 are needed.")
        linear = self.last_layer == "linear" and self.norm_prototypes is True
        require(not linear, "head.norm_prototypes is true but a linear last layer has no norms to keep; leave it out.")
        own = {"patch_hidden_dim": self.patch_hidden_dim, "patch_bottleneck_dim": self.patch_bottleneck_dim}
        if self.patches == "shared":
            own["patch_prototypes"] = self.patch_prototypes
        given = [name for name, value in own.items() if value is not None]
        require(
            self.patches == "own_head" or not given,
            f"head.{given[0] if given else ''} is given but head.patches is {self.patches}; expected own_prototypes or "
            "own_head.",
        )
        sizes = {"patch_prototypes": self.patch_prototypes, **own}
        require_positive("head", **{name: value for name, value in sizes.items() if value is not None})
        least = self.patch_bottleneck_dim
        require(least is None or least >= 2, f"head.patch_bottleneck_dim is {least} but at least 2 are needed.")
