"""The names of parameters in published checkpoints, as ours."""

from collections.abc import Mapping

from torch import Tensor

WRAPPERS = ("module.", "backbone.")  # of distributed training, and of V-JEPA's several masks
DECODER = "decoder_"
PREDICTOR = "predictor_"


def masked_autoencoder(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MAE's tensors by the names of ``MaskedAutoencoder``; a file without a decoder gives those of the backbone."""
    return {_autoencoder_name(name): tensor for name, tensor in published.items()}


def context_predictor(encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """I-JEPA's or V-JEPA's tensors of encoder and predictor by the names of ``ContextPredictor``."""
    backbone = {f"backbone.{_unwrapped(name)}": tensor for name, tensor in encoder.items()}
    return backbone | {f"predictor.{_predictor_name(_unwrapped(name))}": tensor for name, tensor in predictor.items()}


def _autoencoder_name(name: str) -> str:
    name = _unwrapped(name)
    if name == "mask_token":
        return "decoder.mask_token"
    return f"decoder.{name.removeprefix(DECODER)}" if name.startswith(DECODER) else f"backbone.{name}"


def _predictor_name(name: str) -> str:
    return "mask_tokens.0" if name == "mask_token" else name.removeprefix(PREDICTOR)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
