"""The projection head."""

from dataclasses import dataclass

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
        norm_prototypes: keep every prototype at norm 1; null means true for dino and false for dino-vmf, where the norms
            are the concentrations.
    """

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    batch_norm: bool = False
    norm_prototypes: bool | None = None

    def __post_init__(self) -> None:
        require_positive("head", hidden_dim=self.hidden_dim, layers=self.layers)
        require(self.bottleneck_dim >= 2, f"head.bottleneck_dim is {self.bottleneck_dim} but at least 2 are needed.")
        require(self.prototypes >= 2, f"head.prototypes is {self.prototypes} but at least 2 are needed.")
