"""The centring rule of each name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.distributed import ProcessGroup

from vmf_kernels.centering.logit import LogitCenter
from vmf_kernels.centering.probability import AVERAGES, ProbabilityCenter
from vmf_kernels.centering.rule import CenteringRule
from vmf_kernels.centering.running_mean import STARTS
from vmf_kernels.centering.sinkhorn import SinkhornKnopp


class RuleOptions(NamedTuple):
    """The options of a loss from which its rule is made; ``losses.stream.Stream`` documents them."""

    num_prototypes: int
    momentum: float
    average: str
    start: str
    backend: str
    prototype_group: ProcessGroup | None
    row_group: ProcessGroup | None

    @property
    def common(self) -> dict[str, Any]:
        """Keywords that every rule in this folder takes."""
        return {"backend": self.backend, "prototype_group": self.prototype_group, "row_group": self.row_group}


# a rule by its name: one line for each, from the options to the rule
Rules = Mapping[str, Callable[[RuleOptions], CenteringRule]]
RULES: Rules = {
    "logit": lambda o: LogitCenter(o.num_prototypes, o.momentum, start=o.start, **o.common),
    "probability": lambda o: ProbabilityCenter(
        o.num_prototypes, o.momentum, average=o.average, start=o.start, **o.common
    ),
    "sinkhorn_knopp": lambda o: SinkhornKnopp(3, **o.common),
}
ASKED = sorted(name for name in vars(CenteringRule) if not name.startswith("_"))  # attributes that every rule must have


def make_rule(centering: str | CenteringRule, options: RuleOptions, rules: Rules = RULES) -> CenteringRule:
    """The rule of this name in ``rules``, or the rule itself.

    Raises:
        ValueError: the name is unknown, an option is out of range, or the rule has other groups of ranks.
        TypeError: it is neither a name nor a rule; the text says what it lacks.
    """
    for name, value, known in (("center_average", options.average, AVERAGES), ("center_start", options.start, STARTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if isinstance(centering, str):
        if centering not in rules:
            raise ValueError(f"centering is {centering!r}; expected one of {', '.join(rules)}, or a CenteringRule")
        return rules[centering](options)
    if isinstance(centering, type):
        raise TypeError(f"centering is the class {centering.__name__}; expected an instance of it")
    lacks = [name for name in ASKED if not hasattr(centering, name)]
    if lacks:
        raise TypeError(
            f"centering is a {type(centering).__name__} without {', '.join(lacks)}; expected one of {', '.join(rules)}, or a "
            "CenteringRule"
        )
    if options.row_group is not None:
        raise ValueError("row_group is given beside a centring rule; expected it to be given to the rule itself")
    if options.prototype_group is not None and centering.prototype_group is not options.prototype_group:
        raise ValueError("prototype_group is not that of the centring rule; expected one group, given to both")
    return centering
