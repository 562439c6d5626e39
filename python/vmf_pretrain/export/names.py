"""Tensors by the names of another library: every name is translated, or the export fails."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.export.transformer import ANY

MASK_TOKEN = "mask_token"  # of a student's backbone; no feature of a whole image depends on it
SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}  # what a block's scales multiply


def without_mask_token(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors but the one that takes the place of hidden patches."""
    return {name: tensor for name, tensor in tensors.items() if name != MASK_TOKEN}


def translated(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], form: str) -> dict[str, Tensor]:
    """The tensors by their new names.

    Args:
        tensors: by timm's names.
        rules: regular expressions of whole names, and what takes their place.
        form: for the error.

    Raises:
        PretrainError: a name fits no rule, so that the form would lack its tensor.
    """
    found: dict[str, Tensor] = {}
    left: list[str] = []
    for name, tensor in tensors.items():
        new = next((match.expand(to) for rule, to in rules if (match := re.fullmatch(rule, name))), None)
        if new is None:
            left.append(name)
            continue
        assert new not in found, f"{new} has two sources"
        found[new] = tensor
    if left:
        raise PretrainError(f"the {form} form has no place for {', '.join(left)}; {ANY}")
    return found


def split_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as tensors of their own: ``attn.qkv`` becomes ``attn.q``, ``attn.k`` and ``attn.v``."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {name.replace(".attn.qkv.", f".attn.{part}."): rows for part, rows in parts}
        else:
            found[name] = tensor
    return found


def scales_multiplied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks' scales multiplied into the linear layers before them, in fp64: ``g (W x + b) = (g W) x + g b``."""
    scales = {name: tensor for name, tensor in tensors.items() if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)}
    found = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for name, scale in scales.items():
        block, branch, _ = name.rsplit(".", 2)
        for part in ("weight", "bias"):
            target = f"{block}.{SCALED[branch]}.{part}"
            rows = found[target]
            found[target] = (scale.double().view(-1, *[1] * (rows.ndim - 1)) * rows.double()).to(rows.dtype)
    return found


def with_class_position(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``pos_embed`` as [1, 1 + N, F], where it is that of the N patches alone: the class token's position is 0."""
    positions = tensors["pos_embed"]
    zero = positions.new_zeros(1, 1, positions.shape[-1])
    return {**tensors, "pos_embed": torch.cat([zero, positions], dim=1)}
