"""The methods by name, and methods from elsewhere by import path."""

import importlib

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.methods.dino import DINO, DINOvMF
from vmf_pretrain.methods.dinov2 import DINOv2, DINOv2vMF
from vmf_pretrain.methods.ibot import IBOT, IBOTvMF
from vmf_pretrain.methods.ijepa import IJEPA, VJEPA
from vmf_pretrain.methods.mae import MAE
from vmf_pretrain.methods.method import Method

METHODS: dict[str, type[Method]] = {
    "dino": DINO,
    "dino-vmf": DINOvMF,
    "ibot": IBOT,
    "ibot-vmf": IBOTvMF,
    "dinov2": DINOv2,
    "dinov2-vmf": DINOv2vMF,
    "mae": MAE,
    "ijepa": IJEPA,
    "vjepa": VJEPA,
}


def method_class(config: Config, *, allow_code: bool = False) -> type[Method]:
    """The class of a configuration's method.

    Args:
        config: ``method`` is a name of ``METHODS``, or "module:Class" for a method from elsewhere.
        allow_code: whether a module may be imported because a configuration names it.

    Raises:
        PretrainError: the name is unknown, or the module may not or cannot be imported, or holds no such method.
    """
    name = config.method
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise PretrainError(f"method is {name!r}; expected one of {', '.join(METHODS)}, or module:Class.")
    if not allow_code:
        raise PretrainError(f"method {name} would import code; pass --allow-code if you trust the module {module}.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PretrainError(f"method {name} cannot be imported: {error}.") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise PretrainError(f"method {name} is no class derived from vmf_pretrain.methods.method.Method.")
    return found
