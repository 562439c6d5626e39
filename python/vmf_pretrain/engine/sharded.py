"""A method whose parameters, gradients and optimizer state are shared out over the ranks (FSDP2)."""

import warnings

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vmf_kernels import DINOHead
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.methods.method import Method
from vmf_pretrain.networks import ranks
from vmf_pretrain.networks.unit import Unit


def shard(method: Method, device: torch.device) -> None:
    """Shard every vision transformer by blocks, every head and ``Unit``, and every other layer with parameters of its own.

    Raises:
        PretrainError: a parameter stands directly in the method.

    The networks that follow are sharded as the trained ones are, so that a moving average needs no communication.
    """
    # heads and backbones return views, which nothing here changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (ranks.count(),))
    transformers = [part for part in method.modules() if isinstance(part, VisionTransformer)]
    for transformer in transformers:
        for block in transformer.blocks:
            _shard(block, mesh)
    # backbones and heads are units of their own, not parts of a larger one: a backbone is also evaluated by itself, and a
    # head's unit returns a copy of the prototypes, which the loss reads later
    units: list[nn.Module] = [*transformers, *(part for part in method.modules() if isinstance(part, DINOHead | Unit))]
    for unit in units:
        _shard(unit, mesh)
    for part in method.modules():
        left = [value for value in part.parameters(recurse=False) if not isinstance(value, DTensor)]
        if left and part is not method:
            _shard(part, mesh)
    direct = [name for name, value in method.named_parameters() if not isinstance(value, DTensor)]
    if direct:
        raise PretrainError(
            f"{direct[0]} stands directly in {type(method).__name__}, where train.parallel fsdp cannot share it out; put "
            "it into a layer, or use ddp."
        )
    for transformer in transformers:  # methods that want tokens call this instead of the transformer
        register_fsdp_forward_method(transformer, "forward_features")


def _shard(part: nn.Module, mesh: DeviceMesh) -> None:
    # a follower has no backward pass, which would share its parameters out again before the moving average
    trained = any(parameter.requires_grad for parameter in part.parameters())
    fully_shard(part, mesh=mesh, reshard_after_forward=None if trained else True)
