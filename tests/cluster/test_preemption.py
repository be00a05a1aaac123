# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: noted, honoured between two steps, given back."""

import os
import signal
import time
from pathlib import Path

import pytest

from jaxllm.checkpoint import find_steps
from jaxllm.cluster.preemption import stop_signals
from jaxllm.config.files import config_to_dict

RESUMABLE = 75
COMMAND = ("-m", "jaxllm.train", "--config=run.py", "--workdir=run")
LIMIT_S = 120


def send(number: int):
    os.kill(os.getpid(), number)


CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_is_noted_and_the_handlers_are_given_back(number, caplog):
    before = [signal.getsignal(each) for each in CAUGHT]
    with stop_signals() as should_stop:
        assert not should_stop()
        send(number)
        assert should_stop()
        assert should_stop()
    assert [signal.getsignal(each) for each in CAUGHT] == before
    name = signal.Signals(number).name
    assert caplog.messages == [f"{name}: saving after this step, then stopping."]


def test_a_second_interruption_does_not_wait_and_a_second_sigterm_does():
    with stop_signals() as should_stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stop_signals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_that_closes_is_ignored_where_nohup_said_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as should_stop:
            send(signal.SIGHUP)
            assert not should_stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Training:
    """A training process; the text that it has said so far."""

    def __init__(self, folder: Path, start_training):
        self.said = folder / "said.txt"
        self.process = start_training(COMMAND, folder, self.said, {})

    def wait_for(self, text: str):
        """Waits until it has said a text."""
        end_s = time.monotonic() + LIMIT_S
        while text not in self.said.read_text():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end_s, self.said.read_text()
            time.sleep(0.002)


def stop(training: Training, number: int, moment: str):
    """Sends a signal at a moment; the process must say that it can be resumed."""
    training.wait_for(moment)
    training.process.send_signal(number)
    assert training.process.wait(LIMIT_S) == RESUMABLE, training.said.read_text()


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    config = config_to_dict(tiny({"steps": 100_000, "eval.every": 0}))
    (tmp_path / "run.py").write_text(
        "from jaxllm.config.files import config_from_dict\n"
        f"def get_config():\n    return config_from_dict({config!r})\n"
    )
    return tmp_path


@pytest.fixture
def training(folder, start_training) -> Training:
    return Training(folder, start_training)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "attention:"),  # said before it compiles
        (signal.SIGUSR1, "compiled the step"),
        (signal.SIGINT, "step 3/"),
        (signal.SIGHUP, "step 3/"),
    ],
)
def test_a_process_that_is_asked_to_stop_saves_and_exits_with_75(
    training, folder, number, moment
):
    stop(training, number, moment)
    said = training.said.read_text()
    assert f"{signal.Signals(number).name}: saving after this step" in said
    [stopped] = [line for line in said.splitlines() if line.startswith("stopped at")]
    saved, faults = find_steps(folder / "run" / "checkpoints")
    assert (
        stopped == f"stopped at step {saved[-1]}; the same command resumes from there."
    )
    assert faults == {}
    assert "Traceback" not in said


SIGNALLED = """
import os, signal
from jaxllm.run import startup

called = startup.{0}

def call(*arguments, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return called(*arguments, **named)

startup.{0} = call
"""


@pytest.mark.slow
def test_a_signal_while_a_run_is_resumed_is_not_lost(training, folder, start_training):
    stop(training, signal.SIGTERM, "step 3/")
    saved = find_steps(folder / "run" / "checkpoints")[0][-1]
    config = (folder / "run.py").read_text()
    # Before the run is claimed, before it is read, and when only steps are left.
    for moment in ("check_loggers", "Saves", "Poll"):
        (folder / "run.py").write_text(SIGNALLED.format(moment) + config)
        resumed = Training(folder, start_training)
        assert resumed.process.wait(LIMIT_S) == RESUMABLE, resumed.said.read_text()
        # What arrives before the first step stops the run before it.
        assert f"stopped at step {saved};" in resumed.said.read_text()
        assert find_steps(folder / "run" / "checkpoints")[0][-1] == saved
