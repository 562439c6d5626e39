"""MAE, I-JEPA and V-JEPA in plain fp64 torch, one image at a time, from the published formulas; nothing of ours is called.

``w`` holds the parameters by our names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, floor: float = 1e-6) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + floor).sqrt() * weight + bias


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attention(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """[tokens, width] of normalised tokens: a softmax over keys for each head, then a linear layer."""
    query, key, value = linear(x, w, f"{name}.qkv").chunk(3, dim=-1)
    size = x.shape[-1] // heads
    seen = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / math.sqrt(size)
        seen.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ value[:, part])
    return linear(torch.cat(seen, dim=-1), w, f"{name}.proj")


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """[tokens, width] through attention and a GELU network, each added to what enters it."""
    x = x + attention(norm(x, w, f"{name}.norm1"), w, f"{name}.attn", heads)
    return x + linear(gelu(linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")


def through(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    depth = len({key.split(f"{name}blocks.")[1].split(".")[0] for key in w if key.startswith(f"{name}blocks.")})
    for place in range(depth):
        x = block(x, w, f"{name}blocks.{place}", heads)
    return norm(x, w, f"{name}norm")


def embedded(image: Tensor, w: Weights, name: str, patch: int) -> Tensor:
    """[N, width] of an image [C, H, W], or of a clip [T, C, H, W] in tubelets of two frames."""
    kernel = w[f"{name}patch_embed.proj.weight"].flatten(1)
    clip = image.ndim == 4
    rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
    tokens = []
    for time in range(image.shape[0] // 2 if clip else 1):
        for row in range(rows):
            for column in range(columns):
                square = image[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                if clip:
                    square = square[2 * time : 2 * time + 2].transpose(0, 1)  # channels first
                tokens.append(kernel @ square.flatten())
    return torch.stack(tokens) + w[f"{name}patch_embed.proj.bias"]


def mae_loss(
    w: Weights, images: Tensor, kept: Tensor, *, patch: int, heads: tuple[int, int], norm_pixels: bool
) -> Tensor:
    """sum(mask * mean square error of a patch) / sum(mask)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for image, places in zip(images, kept.tolist(), strict=True):
        positions = w["backbone.pos_embed"][0]
        tokens = embedded(image, w, "backbone.", patch) + positions[1:]
        shown = torch.cat([w["backbone.cls_token"][0] + positions[:1], tokens[places]])
        encoded = linear(through(shown, w, "backbone.", heads[0]), w, "decoder.embed")
        everything = [w["decoder.mask_token"][0, 0]] * len(tokens)
        for order, place in enumerate(places):
            everything[place] = encoded[1 + order]
        decoded = torch.cat([encoded[:1], torch.stack(everything)]) + w["decoder.pos_embed"][0]
        predicted = linear(through(decoded, w, "decoder.", heads[1]), w, "decoder.pred")[1:]
        columns = image.shape[-1] // patch
        for place in set(range(len(tokens))) - set(places):
            row, column = divmod(place, columns)
            square = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            target = square.permute(1, 2, 0).flatten()
            if norm_pixels:
                spread = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
                target = (target - target.mean()) / (spread + 1e-6) ** 0.5
            total, count = total + ((predicted[place] - target) ** 2).sum() / len(target), count + 1
    return total / count


def jepa_loss(
    w: Weights, teacher: Weights, inputs: Tensor, masks: dict[str, Tensor], *, patch: int, heads: tuple[int, int]
) -> Tensor:
    """Mean over masks of the mean distance: smooth L1 of one mask, L1 of two."""
    losses = []
    for number in range(len(masks) // 2):
        context, target = masks[f"context.{number}"], masks[f"target.{number}"]
        distances = []
        for image, places, blocks in zip(inputs, context, target, strict=True):
            tokens = embedded(image, w, "backbone.", patch) + w["backbone.pos_embed"][0]
            seen = through(tokens[places], w, "backbone.", heads[0])
            aims = through(embedded(image, teacher, "", patch) + teacher["pos_embed"][0], teacher, "", heads[0])
            aims = layer_norm(aims, floor=1e-5).detach()
            positions = w["predictor.pos_embed"][0]
            for one in blocks:
                known = linear(seen, w, "predictor.embed") + positions[places]
                joined = torch.cat([known, w[f"predictor.mask_tokens.{number}"][0] + positions[one]])
                predicted = linear(through(joined, w, "predictor.", heads[1]), w, "predictor.proj")[len(known) :]
                distances.append((predicted - aims[one]).abs().flatten())
        far = torch.cat(distances)
        losses.append((far if len(masks) > 2 else torch.where(far < 1, far**2 / 2, far - 0.5)).mean())
    return torch.stack(losses).mean()


def positions_of(grid: tuple[int, ...], width: int, order: tuple[int, ...]) -> Tensor:
    """[N, width]: for each axis in turn the sines, then the cosines, of its place times 10000 ** (-k / half)."""
    share = 2 * math.ceil(width / (2 * len(grid)))
    rows: list[list[float]] = []
    for place in range(math.prod(grid)):
        coordinates, rest = [0] * len(grid), place
        for axis in reversed(range(len(grid))):
            rest, coordinates[axis] = divmod(rest, grid[axis])
        row: list[float] = []
        for axis in order:
            angles = [coordinates[axis] / 10000 ** (k / (share / 2)) for k in range(share // 2)]
            row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        rows.append(row[:width])
    return torch.tensor(rows, dtype=torch.float64)
