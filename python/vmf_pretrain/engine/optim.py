"""Parameter groups, rates, and clipping."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmf_pretrain.networks.backbone import layers_above

LAST_LAYER = "last_layer"  # in the names of prototypes, as published
CLIP_EPSILON = 1e-6  # keeps the clip coefficient finite where a gradient is exactly zero


def parameter_groups(
    module: nn.Module, *, layer_decay: float = 1.0, patch_embed_rate: float = 1.0, last_layer_apart: bool = False
) -> list[dict[str, object]]:
    """AdamW groups named "decayed" and "plain", one of each unless rates differ. Biases and vectors are "plain".

    What is plain has no weight decay. Parameters with ``requires_grad`` False are in no group.

    Args:
        module: what is trained.
        layer_decay: factor on the learning rate from each block of a vision transformer to the one before it.
        patch_embed_rate: factor on that of patch embeddings.
        last_layer_apart: whether prototypes have groups of their own.
    Source: repository facebookresearch/dinov2, dinov2/utils/param_groups.py.
    """
    above = layers_above(module)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = name.endswith(".bias") or parameter.ndim == 1
            rate = layer_decay ** above.get(name, 0) * (patch_embed_rate if ".patch_embed." in name else 1.0)
            apart = last_layer_apart and LAST_LAYER in name
            groups.setdefault((plain, rate, apart), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": "plain" if plain else "decayed",
            "rate": rate,
            "last_layer": apart,
            **({"weight_decay": 0.0} if plain else {}),
        }
        for (plain, rate, apart), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def set_rates(
    optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float, *, last_layer_rests: bool = False
) -> None:
    """Set this step's learning rate on every group, by its rate, and this step's weight decay on the groups "decayed"."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if last_layer_rests and group["last_layer"] else learning_rate * group["rate"]
        if group["name"] == "decayed":
            group["weight_decay"] = weight_decay


def gradients_of(module: nn.Module, clip_of: str = "parameter") -> list[list[Tensor]]:
    """The gradients that are present, in the groups that are clipped: each "parameter", or each "module".

    A module is a part of a trained network, two levels down: backbone, head, decoder, predictor.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            above = ".".join(name.split(".")[:-1][:2])
            groups.setdefault(name if clip_of == "parameter" else above, []).append(parameter.grad)
    return list(groups.values())


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is shared out over ranks, on each of them; every rank must call it. Others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts, in the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def clip_groups(groups: Sequence[list[Tensor]], max_norm: float) -> Tensor:
    """Scale each group of gradients, in place, to a joint L2 norm of at most ``max_norm``; 0 changes nothing.

    Returns:
        0-dim float32: the L2 norm of all gradients together before clipping; not finite if any of them is not.
    """
    gradients = [gradient for group in groups for gradient in group]
    norms = [whole_tensor(norm) for norm in torch._foreach_norm(gradients)]
    if max_norm > 0:
        each = iter(norms)
        joint = torch.stack([_joint([next(each) for _ in group]) for group in groups])
        coefficients = (max_norm / (joint + CLIP_EPSILON)).clamp(max=1.0).unbind()
        factors = [factor for factor, group in zip(coefficients, groups, strict=True) for _ in group]
        torch._foreach_mul_(local_tensors(gradients), factors)
    return torch.stack([norm.float() for norm in norms]).square().sum().sqrt()


def _joint(norms: list[Tensor]) -> Tensor:
    """[] L2 norm of tensors of those norms."""
    return norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
