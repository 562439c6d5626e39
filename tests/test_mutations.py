"""The faults of ``python -m tests.mutations`` fit the tree as it is; whether tests notice them is that script's to say."""

from __future__ import annotations

import pytest

from tests.fault import Mutation, mutated
from tests.mutations import MUTATIONS, ROOT

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_replaces_a_text_that_is_there_once(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert mutated(text, mutation) != text
    missing = [name for name in mutation.tests if not (ROOT / name).exists()]
    assert not missing, f"{missing} are gone"


def test_a_fault_that_no_longer_fits_is_refused() -> None:
    """Negative control."""
    with pytest.raises(ValueError, match="has 'once' 2 times; expected once"):
        mutated("once and once", Mutation("a fault", "a file", "once", "twice", ()))


def test_names_are_different() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
