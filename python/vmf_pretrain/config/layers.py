"""Layers of settings in one: a later layer wins, key by key, and also over another way to say the same."""

from collections.abc import Mapping
from typing import Any

from vmf_pretrain.config.typed import merged

# two ways to say the learning rate; a layer that takes one leaves nothing of the other in the layers below
WAYS = (("learning_rate",), ("base_learning_rate", "batch_rule"))


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of all layers. Where one layer itself says a rate in both ways, both stay, to be refused."""
    result: dict[str, Any] = {}
    for layer in layers:
        result = merged(_without_other_rate(result, layer), layer)
    return result


def _without_other_rate(below: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """What lies below, without the rate that a layer says in the other way."""
    given, kept = layer.get("optim", {}), dict(below.get("optim", {}))
    for one, other in (WAYS, WAYS[::-1]):
        if given.get(one[0]) is not None:
            kept = {key: value for key, value in kept.items() if key not in other}
    return {**below, "optim": kept} if "optim" in below else below
