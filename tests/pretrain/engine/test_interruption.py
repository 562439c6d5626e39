"""Signals set a flag; the second one ends the program as if nobody had listened."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from vmf_pretrain.engine.interruption import SIGNALS, Interruption

pytestmark = pytest.mark.quick


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_only_sets_the_flag_and_the_exit_code(number: signal.Signals, code: int) -> None:
    with Interruption() as interruption:
        signal.raise_signal(number)
    assert interruption.requested is number
    assert interruption.exit_code == code


def test_without_a_signal_the_exit_code_is_zero() -> None:
    with Interruption() as interruption:
        pass
    assert interruption.requested is None
    assert interruption.exit_code == 0


@pytest.fixture
def interrupts_raise() -> Iterator[None]:
    """Python's own handler: a shell starts what runs in its background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", SIGNALS)
def test_second_signal_does_what_it_did_before(first: signal.Signals, interrupts_raise: None) -> None:
    with Interruption() as interruption:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interruption.requested is first


def test_handlers_are_given_back_even_after_an_error() -> None:
    before, during = handlers(), []

    def fail() -> None:
        with Interruption():
            during.extend(handlers())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert during != before, "no handler was set"
    assert handlers() == before
