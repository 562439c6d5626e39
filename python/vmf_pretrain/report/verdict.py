"""What the logged figures of a run say of it, in words: alive, collapsed and how, diverging, or still learning.

A pure function of the records of metrics.jsonl; no torch is needed. Which figures a method logs decides what can be said.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from vmf_pretrain.config.run import Config
from vmf_pretrain.report import bands
from vmf_pretrain.report.advice import (
    against_constant,
    against_divergence,
    against_low_rank,
    against_one_hot,
    against_patches,
    against_uniform,
)
from vmf_pretrain.report.bands import Curves
from vmf_pretrain.report.heads import Form, Head

Kind = Literal[
    "alive",
    "still learning",
    "too short to say",
    "uniform collapse",
    "one-hot collapse",
    "dead head",
    "patch collapse",
    "rank collapse",
    "constant predictor",
    "diverging",
]
FAULTS: tuple[Kind, ...] = (
    "uniform collapse",
    "one-hot collapse",
    "dead head",
    "patch collapse",
    "rank collapse",
    "constant predictor",
    "diverging",
)
QUARTERS = 4
SPREAD = ("largest_share", "feature_rank", "feature_variance")
KINDS: dict[Form, Kind] = {"one-hot": "one-hot collapse", "uniform": "uniform collapse", "constant": "dead head"}
FORMS: dict[Form, str] = {
    "one-hot": "all {rows} go to the same prototype",
    "uniform": "every {row} goes to all prototypes alike",
    "constant": "every {row} gets the same distribution over prototypes",
}


@dataclass(frozen=True)
class Verdict:
    """What a run has come to.

    Attributes:
        kind: in the words of the field.
        words: one or two sentences for a person.
        evidence: the figures that it rests on, each with its value and the band.
        advice: what to change, the first thing to try first; empty where nothing is wrong.
        figures: the values of the evidence, by their names in metrics.jsonl.
        step: of the last record that was looked at.
    """

    kind: Kind
    words: str
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    step: int = 0

    @property
    def fault(self) -> bool:
        """Whether something is wrong."""
        return self.kind in FAULTS

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kind": self.kind,
            "words": self.words,
            "evidence": list(self.evidence),
            "advice": list(self.advice),
            "figures": dict(self.figures),
            "step": self.step,
        }


def verdict(records: Sequence[Mapping[str, Any]], config: Config) -> Verdict:
    """What a run has come to at its last record.

    Args:
        records: those of metrics.jsonl, in order (``storage.metrics.read_metrics``); figures that are not finite are None.
        config: of the run.
    """
    curves = Curves.of(records)
    found = _not_finite(curves, config)
    if found is None and curves.step < bands.SHORT:
        found = Verdict("too short to say", _short(curves))
    if found is None:
        found = next((fault for look in LOOKS if (fault := look(curves, config)) is not None), None)
    found = found or _well(curves, config)
    return Verdict(found.kind, found.words, found.evidence, found.advice, found.figures, curves.step)


def _short(curves: Curves) -> str:
    logged = f"the last logged step is {curves.step}" if curves.records else "no step is logged yet"
    return f"Too short to say: {logged}, and a verdict needs {bands.SHORT}."


def _not_finite(curves: Curves, config: Config) -> Verdict | None:
    """Loss or gradient of the last steps is not finite."""
    last = curves.records[-bands.HELD :]
    for name in ("loss", "gradient_norm"):
        missing = sum(name in record and not _finite(record[name]) for record in last)
        if len(last) == bands.HELD and missing == bands.HELD:
            said = f"{name} is not finite at the last {missing} logged steps"
            return Verdict("diverging", "Diverging: the numbers are not finite.", (said,), against_divergence(config))
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _diverging(curves: Curves, config: Config) -> Verdict | None:
    """The loss has risen above its start, or jumps."""
    start, now = curves.start("loss"), curves.now("loss")
    if start is None or now is None or start <= 0:
        return None
    advice, figures = against_divergence(config), {"loss": now}
    if now > bands.RISEN * start:
        said = f"loss {now:.3g}, {now / start:.2g} times that of the start ({start:.3g}); the limit is {bands.RISEN}"
        return Verdict("diverging", "Diverging: the loss has risen above its start.", (said,), advice, figures)
    jumps = _jumps(curves, start)
    if jumps > 1:  # one may be a batch; a steep way down has none
        said = f"loss has risen {jumps} times by more than {bands.JUMPS} of its start ({start:.3g}) in the last "
        said += f"{bands.WATCHED} logged steps"
        return Verdict("diverging", "Diverging: the loss jumps up and down.", (said,), advice, figures)
    return _forgotten(curves, config)


def _jumps(curves: Curves, start: float) -> int:
    """How often the loss has risen steeply of late."""
    losses = curves.values("loss")[-bands.WATCHED :]
    return sum(after - before > bands.JUMPS * start for before, after in itertools.pairwise(losses))


def _forgotten(curves: Curves, config: Config) -> Verdict | None:
    """Predictions were better than a constant, and are no longer."""
    relative = curves.values("relative_loss")
    before, last = relative[: -bands.HELD], relative[-bands.HELD :]
    if not before or min(before) >= bands.AS_CONSTANT or min(last) <= bands.WORSE_THAN_CONSTANT:
        return None
    said = f"relative_loss {median(last):.3g}, after {min(before):.3g}; predicting a constant gives 1"
    words = "Diverging: predictions have become worse than a constant."
    return Verdict("diverging", words, (said,), against_divergence(config), {"relative_loss": median(last)})


def _collapsed(curves: Curves, config: Config) -> Verdict | None:
    """Prototypes tell nothing about an image."""
    head = Head.of_class_tokens(curves, config)
    if not _ended(head, config, since=0):
        return None
    extra = (curves.now(name) for name in SPREAD)
    figures = head.figures | {name: value for name, value in zip(SPREAD, extra, strict=True) if value is not None}
    form = head.form
    kind, words = KINDS[form], FORMS[form].format(row="image", rows="images")
    spread, apart = _features_said(curves)
    if kind == "dead head":
        said = f"The head is dead: {words}."
    elif apart:
        kind = "dead head"
        said = (
            f"The head is dead under healthy features: {words}, so the loss teaches the backbone nothing, "
            "while its features are held apart by something else (KoLeo, or their start)."
        )
    else:
        said = f"{kind.capitalize()}: {words}."
    return Verdict(kind, said, (*head.said(form), *spread), _against(form, config), figures)


def _patches_collapsed(curves: Curves, config: Config) -> Verdict | None:
    """Prototypes tell nothing about a masked patch; those of class tokens were looked at before."""
    head = Head.of_patches(curves, config)
    if not _ended(head, config, since=config.masks.start_epoch):
        return None
    form, others = head.form, Head.of_class_tokens(curves, config).figures
    alive = "; the head of the class tokens has not collapsed" if others else ""
    words = f"Patch collapse: {FORMS[form].format(row='masked patch', rows='masked patches')}{alive}."
    evidence = (*head.said(form), *(f"{name} {value:.3g} of the class tokens" for name, value in others.items()))
    return Verdict("patch collapse", words, evidence, against_patches(config, form), head.figures)


def _ended(head: Head, config: Config, *, since: int) -> bool:
    """Whether a head that began after ``since`` epochs is dead, and neither at its beginning nor thrown about."""
    if not head.dead or _jumps(head.curves, head.curves.start("loss") or math.inf):
        return False  # a head that is thrown about is dead for a while, again and again
    return head.fell or not _warming_up(head.curves, config, since=since)


def _against(form: Form, config: Config) -> tuple[str, ...]:
    both = (*against_uniform(config)[:1], *against_one_hot(config))
    return {"one-hot": against_one_hot(config), "uniform": against_uniform(config), "constant": both}[form]


def _features_said(curves: Curves) -> tuple[tuple[str, ...], bool]:
    """What is known of the backbone's features, and whether they are healthy."""
    start, now, variance = curves.start("feature_rank"), curves.now("feature_rank"), curves.now("feature_variance")
    if start is None or now is None or variance is None:
        return (), False
    least = max(bands.LEAST_RANK, bands.HELD_RANK * start)
    said = f"feature_rank {now:.3g} ({start:.3g} at the start); healthy above {least:.3g}"
    share = f"feature_variance {variance:.2g}; healthy above {bands.LEAST_VARIANCE:g}"
    return (said, share), now >= least and variance >= bands.LEAST_VARIANCE


def _constant(curves: Curves, config: Config) -> Verdict | None:
    """A predictor of features says the same of everything, or its targets have become the same."""
    targets, predicted, relative = (
        curves.now(name) for name in ("target_variance", "predicted_variance", "relative_loss")
    )
    if targets is None or predicted is None:
        return None
    figures = {"target_variance": targets, "predicted_variance": predicted}
    advice = against_constant(config)
    if curves.held_below("target_variance", bands.NO_VARIANCE):
        said = f"target_variance {targets:.2g}; below {bands.NO_VARIANCE:g} all target tokens are alike"
        words = (
            "Constant predictor: the targets have become the same for every image and place, and so has the prediction."
        )
        return Verdict("constant predictor", words, (said,), advice, figures)
    ratio = predicted / targets
    if ratio < bands.CONSTANT_PREDICTION and (relative is None or relative > bands.AS_CONSTANT):
        evidence = [
            f"predicted_variance {predicted:.2g}, {ratio:.2g} of target_variance {targets:.2g}; a constant predictor is "
            f"below {bands.CONSTANT_PREDICTION}"
        ]
        if relative is not None:
            evidence.append(f"relative_loss {relative:.3g}; predicting the mean of the targets gives 1")
            figures["relative_loss"] = relative
        words = "Constant predictor: it says the same of every image and place, although the targets differ."
        return Verdict("constant predictor", words, tuple(evidence), advice, figures)
    return None


def _low_rank(curves: Curves, config: Config) -> Verdict | None:
    """Features differ in one or few directions only."""
    rank, variance, ranks = curves.now("feature_rank"), curves.now("feature_variance"), curves.values("feature_rank")
    if rank is None or variance is None or _warming_up(curves, config) or _dying(curves):
        return None
    advice = against_low_rank(config, spreads=bool(curves.values("koleo")))
    figures = {"feature_rank": rank, "feature_variance": variance}
    limit = max(bands.LEAST_RANK, bands.LOST_RANK * max(ranks))
    if curves.held_below("feature_rank", limit, bands.WATCHED):
        said = f"feature_rank {rank:.3g}, after at most {max(ranks):.3g}; the limit is {limit:.3g}"
        words = "Rank collapse: the features of all images differ in hardly more than one direction."
        return Verdict("rank collapse", words, (said,), advice, figures)
    if curves.held_below("feature_variance", bands.LEAST_VARIANCE, bands.WATCHED):
        said = f"feature_variance {variance:.2g}; below {bands.LEAST_VARIANCE:g} all images have the same features"
        return Verdict("rank collapse", "Rank collapse: all images have the same features.", (said,), advice, figures)
    return None


def _dying(curves: Curves) -> bool:
    """Whether prototypes are about to tell nothing: the features follow the head, and its collapse is what has to be named."""
    last = curves.values("mutual_information")[-bands.WATCHED :]
    return bool(last) and (min(last) < bands.DEAD_INFORMATION or last[-1] < last[0] / 2)


def _well(curves: Curves, config: Config) -> Verdict:
    """Nothing is wrong: whether it still learns."""
    evidence, figures = _alive_said(curves)
    if _warming_up(curves, config):
        words = f"Still learning: the learning rate rises until epoch {config.optim.warmup_epochs}."
        return Verdict("still learning", words, evidence, (), figures)
    moving, accuracy = _moving(curves), curves.evaluated("knn")
    if moving is None:
        kind: Kind = "alive"
        words = "Alive: nothing has collapsed, and the figures have settled."
    else:
        kind = "still learning"
        words = f"Still learning: nothing has collapsed; {moving}."
    if len(accuracy) > 1 and accuracy[-1] < accuracy[0]:
        words += f" But k-NN has not gained from it: {accuracy[-1]:.1f} %, after {accuracy[0]:.1f} % at its first evaluation."
    return Verdict(kind, words, evidence, (), figures)


def _alive_said(curves: Curves) -> tuple[tuple[str, ...], dict[str, float]]:
    said, figures = [], {}
    limits = {
        "mutual_information": (f"nats; alive above {bands.DEAD_INFORMATION}"),
        "relative_loss": "of the loss of predicting a constant",
        "feature_rank": f"directions; healthy above {bands.LEAST_RANK}",
    }
    for name, limit in limits.items():
        value = curves.now(name)
        if value is not None:
            said.append(f"{name} {value:.3g} {limit}")
            figures[name] = value
    accuracy = curves.evaluated("knn")
    if accuracy:
        said.append(f"k-NN {accuracy[-1]:.1f} %, {accuracy[0]:.1f} % at the first evaluation")
        figures["knn"] = accuracy[-1]
    return tuple(said), figures


def _moving(curves: Curves) -> str | None:
    """Which figure still changes in the last quarter, or that it is too early to tell; None if all have settled."""
    for name in ("mutual_information", "relative_loss", "loss"):
        values = curves.values(name)
        size = len(values) // QUARTERS
        if not values:
            continue
        if size < bands.HELD:
            return "too few steps are logged to tell whether the figures have settled"
        before, after = median(values[-2 * size : -size]), median(values[-size:])
        change = (after - before) / max(abs(before), 1e-12)
        if abs(change) > bands.CHANGING:
            return f"{name} has changed by {change:+.1%} from the third quarter of the run to the last"
    return None


def _warming_up(curves: Curves, config: Config, *, since: int = 0) -> bool:
    """Whether the learning rate still rises, or prototypes rest, at the last record, for what began after some epochs."""
    epochs = since + max(config.optim.warmup_epochs, config.optim.freeze_last_layer_epochs)
    return bool(curves.records) and int(curves.records[-1].get("epoch", 0)) <= epochs


LOOKS: tuple[Callable[[Curves, Config], Verdict | None], ...] = (
    _diverging,
    _collapsed,
    _patches_collapsed,
    _constant,
    _low_rank,
)
