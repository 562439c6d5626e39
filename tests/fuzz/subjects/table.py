"""Every function under test by its name."""

from __future__ import annotations

from tests.fuzz.subjects import logit_loss, prototype_loss
from tests.fuzz.subjects.subject import Subject

SUBJECTS: dict[str, Subject] = {**prototype_loss.SUBJECTS, **logit_loss.SUBJECTS}
