"""What frozen features are worth."""

from vmf_pretrain import with_torchvision  # noqa: F401 -- before torchvision or timm is imported
