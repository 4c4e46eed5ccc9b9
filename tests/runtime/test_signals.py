"""A signal sets a flag; all ranks agree; the exit code says requeue."""

from __future__ import annotations

import os
import signal

import pytest

from guided_diffusion.runtime import signals
from guided_diffusion.runtime.signals import REQUEUE_EXIT_CODE, Agreement, Stop
from guided_diffusion.runtime.world import World

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 on this system")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_sets_the_flag_and_the_old_handlers_come_back(name):
    before = signal.getsignal(getattr(signal, name))
    with Stop() as stop:
        assert not stop.requested and not Agreement(World(), stop).stop(1)
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested and Agreement(World(), stop).stop(1)
        assert stop.reason == f"received {name}"
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_signal_reaches_the_handler_from_before_and_a_repeated_one_is_the_same(monkeypatch):
    heard = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with Stop(["SIGUSR1"]):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == []
            monkeypatch.setattr(signals, "_ONE_REQUEST_BY_PROGRAMS_S", -1.0)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_interrupt_is_optional_and_names_are_checked():
    with Stop() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not stop.requested
    with Stop(["SIGINT"]) as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "received SIGINT" and stop.interrupted and stop.exit_code == 130
    with pytest.raises(ValueError, match="'USR1' is no signal"):
        Stop(["USR1"])


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_what_nohup_and_shells_have_ignored_stays_ignored(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Stop(signals.TRAINING_SIGNALS) as stop:
            os.kill(os.getpid(), number)
            assert not stop.requested
    finally:
        signal.signal(number, before)


AGREE = """
import os, signal, sys
from guided_diffusion.runtime.signals import REQUEUE_EXIT_CODE, Agreement, Stop
from guided_diffusion.runtime.world import session
with session("cpu", timeout_s=90) as world, Stop() as stop:
    agreement = Agreement(world, stop)
    for step in range(100):
        if world.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        if step % 5 == 4 and agreement.stop(step):
            print(f"rank {world.rank} saved at {step}: {stop.reason}", flush=True)
            sys.exit(REQUEUE_EXIT_CODE)
"""


def test_ranks_agree_on_the_step_and_leave_with_the_code(launch):
    done = launch("mpiexec", AGREE)
    assert done.code == REQUEUE_EXIT_CODE == 85, done.text
    assert "rank 0 saved at 4: another rank was asked to stop" in done.text
    assert "rank 1 saved at 4: received SIGUSR1" in done.text
