"""The weights that a run starts from."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require

HUB = "timm:"  # before the name of a model whose weights timm publishes


@dataclass(frozen=True)
class StartFromConfig:
    """Weights that a new run starts from; a run that goes on takes its own.

    Attributes:
        weights: "timm:NAME"; a file of ``torch.save`` or of safetensors, as DINO, iBOT, DINOv2, MAE, I-JEPA and V-JEPA publish
            them; or the folder, a checkpoint or the weights of a run of ours. Nothing in it is run. null starts at random.
        network: the name of one of several networks in it, such as "student"; null takes the one that its source evaluates
            (teacher, target_encoder).
        parts: "backbone", or "all": heads, decoder and predictor too, as far as both sides have them.
        keys: "all" refuses a backbone that lacks a tensor or has one to spare; "common" takes the tensors that fit.
        positions: "same" refuses another grid of patches; "resized" interpolates the positions (bicubic).
    """

    weights: str | None = None
    network: str | None = None
    parts: Literal["backbone", "all"] = "backbone"
    keys: Literal["all", "common"] = "all"
    positions: Literal["same", "resized"] = "same"

    def __post_init__(self) -> None:
        changed = [
            name
            for name in ("network", "parts", "keys", "positions")
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.weights is None:
            require(
                not changed,
                f"start_from.{changed and changed[0]} is given without start_from.weights; give both or none.",
            )
            return
        named = self.weights.removeprefix(HUB).strip()
        require(bool(named), f'start_from.weights is "{self.weights}" but must be a path or {HUB}NAME.')

    @property
    def hub_name(self) -> str | None:
        """NAME of "timm:NAME"; None for a path."""
        weights = self.weights or ""
        return weights.removeprefix(HUB).strip() if weights.startswith(HUB) else None
