"""SIGTERM is a KeyboardInterrupt, once, and handlers that Ray puts in place do not stay."""

import os
import signal

import pytest

from ray_synth.cluster import signals


@pytest.fixture(autouse=True)
def handlers_as_before(monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_interrupts_once_and_decides_the_exit_code():
    signals.stop_on_sigterm()
    assert signals.exit_code() == 130
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.exit_code() == 143
    os.kill(os.getpid(), signal.SIGTERM)  # the clean-up is not cut short


def test_handlers_come_back_after_a_block_that_changes_them():
    signals.stop_on_sigterm()
    ours = signal.getsignal(signal.SIGTERM)
    with signals.own_handlers():
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is ours
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_within_such_a_block_is_not_forgotten():
    signals.stop_on_sigterm()
    with pytest.raises(KeyboardInterrupt), signals.own_handlers():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_default_handler_gives_way_to_rays():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ray_puts = lambda *_: None  # noqa: E731
    with signals.own_handlers():
        signal.signal(signal.SIGTERM, ray_puts)
    assert signal.getsignal(signal.SIGTERM) is ray_puts
