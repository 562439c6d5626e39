"""Checks of configuration values; each raises an error of one sentence."""

import math

from vmf_pretrain.config.errors import PretrainError


def require(condition: bool, message: str) -> None:
    """Raise PretrainError with ``message`` unless ``condition``."""
    if not condition:
        raise PretrainError(message)


def require_positive(section: str, **values: float) -> None:
    """Every value of the section is > 0."""
    for name, value in values.items():
        require(0 < value < math.inf, f"{section}.{name} is {value} but must be greater than 0 and finite.")


def require_not_negative(section: str, **values: float) -> None:
    """Every value of the section is >= 0 and finite."""
    for name, value in values.items():
        require(0 <= value < math.inf, f"{section}.{name} is {value} but must be 0 or greater and finite.")


def require_share(section: str, **values: float) -> None:
    """Every value of the section lies in [0, 1]."""
    for name, value in values.items():
        require(0.0 <= value <= 1.0, f"{section}.{name} is {value} but must lie between 0 and 1.")


def require_range(section: str, **ranges: tuple[float, float]) -> None:
    """Every value of the section is (low, high) with 0 < low <= high."""
    for name, (low, high) in ranges.items():
        fits = 0 < low <= high < math.inf
        require(fits, f"{section}.{name} is [{low}, {high}] but must be two numbers with 0 < low <= high.")
