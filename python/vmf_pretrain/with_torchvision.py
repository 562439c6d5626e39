"""Importing this module makes torchvision importable; a room whose files import torchvision or timm imports it first."""

from vmf_pretrain.torchvision_import import import_torchvision

DECLARATIONS = import_torchvision()  # kept for as long as torchvision is used
