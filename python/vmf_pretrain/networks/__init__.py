"""Backbones, and the network that follows the trained one."""

from vmf_pretrain import with_torchvision  # noqa: F401 -- before torchvision or timm is imported
