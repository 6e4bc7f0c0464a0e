"""Signals wait for the end of a step; the second does not, and nothing of it stays."""

import os
import signal
import threading

import pytest
import torch

from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.stopping import SIGNALS, Stopped, StopSignal


class Told(Ranks):
    """Two processes, the other of which was asked to stop, or was not."""

    def __init__(self, other: bool) -> None:
        super().__init__(None)
        self.count, self.other = 2, other

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tensor([float(self.other)]), tensor])


@pytest.fixture
def obeyed():
    """Signals that came through to what was there before."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_the_second_obeyed(obeyed, number):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with StopSignal(Ranks(None)) as stop:
        stop.check()
        stop.check_alone()
        send(number)
        assert not obeyed and stop.name == number.name
        for check in (stop.check, stop.check_alone):
            with pytest.raises(Stopped):
                check()
        send(signal.SIGTERM)
        assert obeyed == [signal.SIGTERM] and stop.name == number.name
        assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_handlers_come_back_after_an_error(obeyed):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped), StopSignal(Ranks(None)) as stop:
        assert all(signal.getsignal(each) not in handlers for each in SIGNALS)
        send(signal.SIGINT)
        stop.check()
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    send(signal.SIGINT)
    assert obeyed == [signal.SIGINT]


def test_in_a_thread_and_where_it_is_off_signals_act_as_ever(obeyed):
    handlers, found = [signal.getsignal(each) for each in SIGNALS], []

    def look(**options):
        with StopSignal(Ranks(None), **options) as stop:
            found.append([signal.getsignal(each) for each in SIGNALS])
            stop.check()
            if threading.current_thread() is threading.main_thread():
                send(signal.SIGTERM)
                stop.check()
                stop.check_alone()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    look(enabled=False)
    assert found == [handlers, handlers] and obeyed == [signal.SIGTERM]


def test_every_process_stops_if_one_was_asked_to(obeyed):
    with StopSignal(Told(other=False)) as stop:
        stop.check()
        send(signal.SIGINT)
        stop.check_alone()  # the other may be elsewhere
        with pytest.raises(Stopped):
            stop.check()
    with StopSignal(Told(other=True)) as stop:
        with pytest.raises(Stopped):
            stop.check()
        assert stop.name == "SIGTERM"
    assert not obeyed
