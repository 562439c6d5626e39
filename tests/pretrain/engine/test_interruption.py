"""Signals set a flag; the second one ends the program as if nobody had listened."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from vmf_pretrain.engine.interruption import SAVE, SIGNALS, Interruption, no_requests
from vmf_pretrain.engine.votes import Counts

pytestmark = pytest.mark.quick


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_only_sets_the_flag_that_all_ranks_are_told_of(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert interruption.votes(0) == Counts()
        signal.raise_signal(number)
        assert interruption.requested is number
        assert interruption.votes(3).stop is number


@pytest.mark.skipif(SAVE is None, reason="no SIGUSR1 here")
def test_request_for_a_checkpoint_is_said_once() -> None:
    assert SAVE is not None
    with Interruption() as interruption:
        signal.raise_signal(SAVE)
        signal.raise_signal(SAVE)
        assert [interruption.votes(0).save for _ in range(2)] == [1, 0]
    with no_requests():
        signal.raise_signal(SAVE)  # would end the process


def test_repetition_by_torchrun_is_no_second_signal(monkeypatch: pytest.MonkeyPatch, interrupts_raise: None) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with Interruption() as interruption:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert interruption.requested is signal.SIGINT
        interruption._repeated = 0.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_another_thread_has_no_handlers() -> None:
    seen: list[object] = []

    def run() -> None:
        with Interruption() as interruption, no_requests():
            seen.append(interruption.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]


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
