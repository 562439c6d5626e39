"""Every function under test by its name."""

from __future__ import annotations

from tests.fuzz.subjects import heads, logit_loss, losses, prototype_loss, prototypes, spread, targets
from tests.fuzz.subjects.subject import Subject

SUBJECTS: dict[str, Subject] = {
    **prototypes.SUBJECTS,
    **prototype_loss.SUBJECTS,
    **logit_loss.SUBJECTS,
    **targets.SUBJECTS,
    **spread.SUBJECTS,
    **heads.SUBJECTS,
    **losses.SUBJECTS,
}
