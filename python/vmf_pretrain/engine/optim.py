"""Parameter groups, rates, and clipping per parameter."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CLIP_EPSILON = 1e-6  # keeps the clip coefficient finite where a gradient is exactly zero


def parameter_groups(module: nn.Module) -> list[dict[str, object]]:
    """Two AdamW groups, "decayed" and "plain". Biases and other one-dimensional parameters are "plain": no weight decay.

    Parameters with ``requires_grad`` False are in neither group.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed, "name": "decayed"}, {"params": plain, "name": "plain", "weight_decay": 0.0}]


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Set this step's learning rate on every group and this step's weight decay on the group "decayed"."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if group["name"] == "decayed":
            group["weight_decay"] = weight_decay


def gradients_of(module: nn.Module) -> list[Tensor]:
    """The gradients that are present."""
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is shared out over ranks, on each of them; every rank must call it. Others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts, in the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def clip_each(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient separately, in place, to an L2 norm of at most ``max_norm``; 0 changes nothing.

    Returns:
        0-dim float32: the L2 norm of all gradients together before clipping; not finite if any of them is not.
    """
    norms = [whole_tensor(norm) for norm in torch._foreach_norm(gradients)]
    if max_norm > 0:
        coefficients = (max_norm / (torch.stack(norms) + CLIP_EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(local_tensors(gradients), list(coefficients.unbind()))
    return torch.stack([norm.float() for norm in norms]).square().sum().sqrt()
