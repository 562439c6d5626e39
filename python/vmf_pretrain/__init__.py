"""A thin trainer for self-distillation on top of vmf_kernels."""

from vmf_pretrain.torchvision_import import import_torchvision

# before any module of the package imports torchvision, or timm and lightning, which import torchvision
TORCHVISION_DECLARATIONS = import_torchvision()

__all__ = ["TORCHVISION_DECLARATIONS", "import_torchvision"]
