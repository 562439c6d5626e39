"""Imports torchvision, also on a CPU build of torch.

The published torchvision wheels are linked against CUDA libraries. On a CPU build of torch their compiled operators do not
load, and the import fails at the first Python-side registration for an operator, although nothing here calls one. With the
missing schemas declared, the registration and the import succeed. lightning, torchmetrics and timm import torchvision if it
is installed, so the package does this before anything else.
"""

import importlib
import sys

import torch

# The operators that torchvision registers fake kernels for while it is imported. Declared only; calling one still raises.
MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision() -> torch.library.Library | None:
    """Import torchvision, declaring its operators' schemas first if its compiled part does not load.

    Returns:
        The library that holds the declarations and must be kept alive, or None where torchvision imports as it is.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    declarations = torch.library.Library("torchvision", "FRAGMENT")
    for schema in MISSING_OPERATORS:
        declarations.define(schema)
    importlib.import_module("torchvision")
    return declarations
