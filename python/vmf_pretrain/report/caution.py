"""Whether a run that has not failed fails to learn. No torch is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmf_pretrain.config.run import Config
from vmf_pretrain.report import bands
from vmf_pretrain.report.advice import peak
from vmf_pretrain.report.bands import Curves

PATIENCE = 200  # optimizer steps
NOT_FALLEN = 0.95  # KL over its value at the start


@dataclass(frozen=True)
class Caution:
    """Something to look at; attributes as those of ``Verdict``."""

    kind: str
    words: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]


def not_learning(records: Sequence[Mapping[str, Any]], config: Config) -> Caution | None:
    """Whether the student comes no closer to the teacher, or predictions are no better than a constant, after the warm-up."""
    curves = Curves.of(records)
    last = int(curves.records[-1].get("epoch", 0)) if curves.records else 0
    if curves.step < PATIENCE or last <= config.optim.warmup_epochs:
        return None
    advice = (f"raise optim.learning_rate (it is {peak(config):.2g})", "train longer (train.epochs)")
    start, now = curves.start("kl"), curves.now("kl")
    before, information = curves.start("mutual_information"), curves.now("mutual_information")
    # where the teacher sharpens from a flat start, KL rises with the information: that is learning
    gained = before is not None and information is not None and information > before
    if start is not None and now is not None and now > NOT_FALLEN * start and not gained:
        said = f"kl {now:.3g} nats, {start:.3g} at the start"
        return Caution(
            "kl does not fall", "KL does not fall: the student does not follow the teacher.", (said,), advice
        )
    relative = curves.now("relative_loss")
    if relative is not None and relative > bands.AS_CONSTANT:
        said = f"relative_loss {relative:.3g}; predicting a constant gives 1"
        return Caution(
            "predicts no better than a constant", "Predictions are no better than a constant.", (said,), advice
        )
    return None
