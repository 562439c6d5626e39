"""Weights from elsewhere loaded into a network: what fits is taken, what does not is named.

Legend: P prefix tokens, N patches in H x W, D embedding dimension.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_pretrain.config.start_from import StartFromConfig
from vmf_pretrain.networks.published_names import UnfitWeightsError

Tensors = dict[str, Tensor]

OPTIONAL = frozenset({"mask_token"})  # of a student; teachers and files for evaluation have none
MOST_NAMES = 4  # that an error lists


@dataclass(frozen=True)
class Loaded:
    """What became of the parts of a file.

    Attributes:
        counts: loaded tensors by part.
        left: what the file has and the network did not take.
        kept: what the network has and the file did not give.
        remarks: what was changed on the way.
    """

    counts: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def told(self) -> str:
        """This as the end of a sentence."""
        loaded = ", ".join(f"{count} tensors of the {part}" for part, count in self.counts.items())
        said = [loaded, *self.remarks]
        said += [f"left over there: {', '.join(self.left)}"] if self.left else []
        said += [f"at its start here: {', '.join(self.kept)}"] if self.kept else []
        return "; ".join(said)


def begin_with(network: nn.Module, parts: Mapping[str, Mapping[str, Tensor]], chosen: StartFromConfig) -> Loaded:
    """Load the parts of a file into the children of the same names.

    Args:
        network: has a child ``backbone``, and perhaps ``head``, ``patch_head``, ``decoder``, ``predictor``.
        parts: tensors by part and by our names.
        chosen: what is refused.

    Raises:
        UnfitWeightsError: a tensor is missing, left over or of another shape; the error names them.
    """
    loaded = Loaded()
    for part in parts:
        child = getattr(network, part, None)
        if child is None:
            loaded.left.append(part)
        elif part == "backbone":
            loaded.counts[part] = _load_backbone(child, dict(parts[part]), chosen, loaded)
        else:
            loaded.counts[part] = _load_part(part, child, dict(parts[part]))
    loaded.kept.extend(name for name, child in network.named_children() if name not in loaded.counts)
    return loaded


def _load_backbone(backbone: nn.Module, given: Tensors, chosen: StartFromConfig, loaded: Loaded) -> int:
    own = backbone.state_dict()
    given = _joined_gates(given)
    if "pos_embed" in given and "pos_embed" in own:
        _fit_positions(given, backbone, chosen, loaded)
    for name in sorted(OPTIONAL & (given.keys() ^ own.keys())):
        given.pop(name, None)
        (loaded.kept if name in own else loaded.left).append(name)
    unfit = [
        f"{name} is {_by(given[name])} there but {_by(own[name])} here"
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in given and name not in OPTIONAL]
    surplus = [name for name in given if name not in own]
    if chosen.keys == "all" and (unfit or missing or surplus):
        remedy = " (set the backbone to the file's, or start_from.keys to common to take what fits)"
        raise UnfitWeightsError(_refusal(sorted(unfit), missing, surplus), remedy)
    fitting = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise UnfitWeightsError("no tensor of the backbone fits")
    backbone.load_state_dict(fitting, strict=False)
    loaded.left.extend(name for name in given if name not in fitting)
    loaded.kept.extend(name for name in own if name not in fitting and name not in OPTIONAL)
    return len(fitting)


def _load_part(part: str, module: nn.Module, given: Tensors) -> int:
    """Load a head, decoder or predictor strictly; its own hooks know the forms in which a last layer is stored."""
    if getattr(module, "last_layer2", module) is None:  # iBOT's shared prototypes are stored by both names
        twins = [name for name in given if name.startswith("last_layer2.")]
        if all(torch.equal(given[name], given[name.replace("last_layer2", "last_layer")]) for name in twins):
            for name in twins:
                del given[name]
    count = len(given)
    try:
        module.load_state_dict(given)
    except RuntimeError as error:
        said = " ".join(str(error).split()).partition(": ")[2]
        raise UnfitWeightsError(f"its {part} does not fit: {said.rstrip('.')}") from None
    return count


def _refusal(unfit: list[str], missing: list[str], surplus: list[str]) -> str:
    faults = [*unfit[:MOST_NAMES], *(["and more of other shapes"] if len(unfit) > MOST_NAMES else [])]
    faults += [f"{_listed(missing)} missing there"] if missing else []
    faults += [f"{_listed(surplus)} left over there"] if surplus else []
    return f"its backbone does not fit: {'; '.join(faults)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{', '.join(names[:MOST_NAMES])}{more}"


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _joined_gates(given: Tensors) -> Tensors:
    """SwiGLU's gate and values, which some files hold in layers of their own, in one layer."""
    joined = dict(given)
    for name in given:
        if ".mlp.w1." in name and (values := name.replace(".w1.", ".w2.")) in given:
            joined[name.replace(".w1.", ".fc1.")] = torch.cat([joined.pop(name), joined.pop(values)])
    return joined


def _fit_positions(given: Tensors, backbone: nn.Module, chosen: StartFromConfig, loaded: Loaded) -> None:
    """Positions of the file as the backbone has them: its prefix tokens, its grid of patches. Changes ``given``."""
    wanted = backbone.get_parameter("pos_embed").shape[1]
    grid = tuple(backbone.get_submodule("patch_embed").grid_size)  # type: ignore[arg-type]
    patches, positions = math.prod(grid), given["pos_embed"]
    if positions.ndim != 3:
        return  # refused as another shape
    prefix = _prefix(positions.shape[1], patches, "cls_token" in given)
    if prefix is None:
        return  # refused as another shape
    head, body = positions[:, :prefix], positions[:, prefix:]
    if body.shape[1] != patches:
        body = _resized(body, grid, chosen.positions)
        side = math.isqrt(positions.shape[1] - prefix)
        loaded.remarks.append(f"positions resized from {side} x {side} patches to {grid[0]} x {grid[1]}")
    if prefix == 1 and wanted == patches and "cls_token" in given and head.shape[-1] == given["cls_token"].shape[-1]:
        # ours has no position for the class token: the token is the sum
        given["cls_token"], head = given["cls_token"] + head, head[:, :0]
    elif prefix == 0 and wanted > patches:
        head = positions.new_zeros(1, wanted - patches, positions.shape[-1])
    given["pos_embed"] = torch.cat([head, body], dim=1)


def _prefix(length: int, patches: int, classed: bool) -> int | None:
    """How many of a file's positions are of prefix tokens; None if its patches form no square and are not as many."""
    candidates = [1, 0] if classed else [0]
    same = [prefix for prefix in candidates if length - prefix == patches]
    square = [prefix for prefix in candidates if math.isqrt(length - prefix) ** 2 == length - prefix]
    return next(iter(same or square), None)


def _resized(body: Tensor, grid: tuple[int, ...], how: str) -> Tensor:
    """[1, H * W, D] of positions [1, N, D] on a square; bicubic without antialiasing, as DINO and MAE resize theirs."""
    side = math.isqrt(body.shape[1])
    if how == "same" or len(grid) != 2:
        ours = " x ".join(map(str, grid))
        hint = (
            "set start_from.positions to resized, or another views.global_size"
            if len(grid) == 2
            else "expected the same"
        )
        raise UnfitWeightsError(
            f"its positions are of {side} x {side} patches but the backbone's of {ours}", f"; {hint}"
        )
    square = body.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(body.dtype)
