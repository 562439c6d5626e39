"""State dicts by the names and shapes of published files, at toy width, and what those networks compute, in fp64.

The formulas read the published names, so a name that is mapped to the wrong parameter shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.pretrain.methods.plain import Weights, attention, embedded, gelu, linear, norm

WIDTH, DEPTH, HEADS, PATCH, SIDE = 24, 2, 2, 4, 16
PATCHES = (SIDE // PATCH) ** 2
HIDDEN, BOTTLENECK, PROTOTYPES = 32, 8, 12
GATED = 64  # hidden features of DINOv2's SwiGLU at this width: two thirds of 4 times the width, rounded up to 8

Shapes = dict[str, tuple[int, ...]]


def drawn(shapes: Shapes, seed: int = 0) -> Weights:
    """Random tensors in fp64, of a size that lets each matter."""
    numbers = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=numbers, dtype=torch.float64) for name, shape in shapes.items()}


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def backbone(
    *,
    patches: int = PATCHES,
    classes: int = 1,
    registers: int = 0,
    scale: tuple[str, ...] = (),
    gates: tuple[str, ...] = (),
    chunked: bool = False,
    mask: str = "",
    kernel: tuple[int, ...] = (1, PATCH, PATCH),
) -> Shapes:
    """A vision transformer's shapes.

    Args:
        patches: of its positions.
        classes: 1 with a class token.
        registers: DINOv2's.
        scale: names of the two scales of branches.
        gates: names of SwiGLU's first layers, one of double size or two.
        chunked: whether blocks stand in DINOv2's chunks, here of one block each.
        mask: name of the mask token.
        kernel: of the patch embedding.
    """
    shapes: Shapes = {"pos_embed": (1, classes + patches, WIDTH), **layer("patch_embed.proj", WIDTH, *kernel)}
    shapes |= {"cls_token": (1, 1, WIDTH)} if classes else {}
    shapes |= {"register_tokens": (1, registers, WIDTH)} if registers else {}
    shapes |= {mask: (1, WIDTH)} if mask else {}
    for place in range(DEPTH):
        name = f"blocks.{place}.{place}." if chunked else f"blocks.{place}."
        shapes |= layer(f"{name}norm1", WIDTH) | layer(f"{name}norm2", WIDTH)
        shapes |= layer(f"{name}attn.qkv", 3 * WIDTH, WIDTH) | layer(f"{name}attn.proj", WIDTH, WIDTH)
        shapes |= {f"{name}{part}": (WIDTH,) for part in scale}
        if gates:
            for gate in gates:
                shapes |= layer(f"{name}mlp.{gate}", 2 * GATED // len(gates), WIDTH)
            shapes |= layer(f"{name}mlp.w3", WIDTH, GATED)
        else:
            shapes |= layer(f"{name}mlp.fc1", 4 * WIDTH, WIDTH) | layer(f"{name}mlp.fc2", WIDTH, 4 * WIDTH)
    return shapes | layer("norm", WIDTH)


def head(*last: str, prototypes: int = PROTOTYPES) -> Shapes:
    """DINO's head, with a last layer of each name, as old-style weight norm stores it."""
    shapes = layer("mlp.0", HIDDEN, WIDTH) | layer("mlp.2", HIDDEN, HIDDEN) | layer("mlp.4", BOTTLENECK, HIDDEN)
    for name in last or ("last_layer",):
        shapes |= {f"{name}.weight_g": (prototypes, 1), f"{name}.weight_v": (prototypes, BOTTLENECK)}
    return shapes


def under(prefix: str, tensors: Weights) -> Weights:
    return {prefix + name: value for name, value in tensors.items()}


def tokens(image: Tensor, w: Weights) -> Tensor:
    """[1 + registers + N, WIDTH] of an image [C, H, W], by DINO's, iBOT's or DINOv2's names; registers have no position."""
    patches = embedded(image, w, "", PATCH)
    x = torch.cat([w["cls_token"][0], patches]) + w["pos_embed"][0]
    if "register_tokens" in w:
        x = torch.cat([x[:1], w["register_tokens"][0], x[1:]])
    for place in range(DEPTH):
        name = f"blocks.{place}.{place}" if f"blocks.{place}.{place}.norm1.weight" in w else f"blocks.{place}"
        one, two = (
            next((w[key] for key in (f"{name}.ls{branch}.gamma", f"{name}.gamma_{branch}") if key in w), 1.0)
            for branch in (1, 2)
        )
        x = x + one * attention(norm(x, w, f"{name}.norm1"), w, f"{name}.attn", HEADS)
        x = x + two * _perceptron(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")
    return norm(x, w, "norm")


def _perceptron(x: Tensor, w: Weights, name: str) -> Tensor:
    if f"{name}.fc1.weight" in w:
        return linear(gelu(linear(x, w, f"{name}.fc1")), w, f"{name}.fc2")
    if f"{name}.w12.weight" in w:
        gate, value = linear(x, w, f"{name}.w12").chunk(2, dim=-1)
    else:
        gate, value = linear(x, w, f"{name}.w1"), linear(x, w, f"{name}.w2")
    return linear(gate / (1 + (-gate).exp()) * value, w, f"{name}.w3")


def logits(features: Tensor, w: Weights, last: str = "last_layer") -> Tensor:
    """[R, K] of features [R, WIDTH], by DINO's names."""
    x = features
    for name in ("mlp.0", "mlp.2"):
        x = gelu(linear(x, w, name))
    x = linear(x, w, "mlp.4")
    x = x / (x * x).sum(-1, keepdim=True).sqrt()
    direction = w[f"{last}.weight_v"]
    return x @ (w[f"{last}.weight_g"] * direction / (direction * direction).sum(-1, keepdim=True).sqrt()).T
