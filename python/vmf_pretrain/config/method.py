"""The names of the methods, without their networks: settings are checked before anything heavy is imported."""

import re

from vmf_pretrain.config.checks import require

METHODS = ("dino-vmf", "dino", "ibot", "ibot-vmf", "dinov2", "dinov2-vmf", "mae", "ijepa", "vjepa")
PATCH_METHODS = ("ibot", "ibot-vmf", "dinov2", "dinov2-vmf")  # those with a loss of masked patches
ONE_TEMPERATURE = ("dinov2", "dinov2-vmf")  # those whose patches have the teacher temperature of the class tokens
VMF = "-vmf"  # the end of the names of those whose prototypes have concentrations
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(method: str) -> bool:
    """Whether a method is a class of the user's own, ``module:Class``."""
    return _IMPORT_PATH.fullmatch(method) is not None


def require_method(method: str) -> None:
    """A method is one of ours, or an import path; importing it is for the engine, and only with --allow-code.

    Raises:
        PretrainError: it is neither.
    """
    known = ", ".join(METHODS)
    require(
        method in METHODS or is_import_path(method), f"method is {method} but must be one of {known}, or module:Class."
    )
