# SPDX-License-Identifier: Apache-2.0
"""The watchdog: what may take how long, who is blamed, and how a process ends."""

import contextlib
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from jaxllm.cluster.limits import MARGIN, PATIENCE, REMEMBERED, WARM_UP, Limits
from jaxllm.cluster.peers import Identity, Link, Peers, identity
from jaxllm.cluster.phases import Phase, Phases
from jaxllm.cluster.verdict import Sign, judge, late
from jaxllm.cluster.watchdog import MISSED, STALLS, TICK_S, Watchdog

FLOOR_S = 10.0
LEAD, ONE, TWO = (Identity(i, f"node{i}", 100 + i) for i in range(3))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def phases(clock) -> Phases:
    phases = Phases(clock=clock)
    phases.begin("other")
    return phases


@pytest.fixture
def limits(phases, clock) -> Limits:
    return Limits(phases, FLOOR_S, clock=clock)


def spend(phases: Phases, clock: Clock, *parts: tuple[Phase, float]):
    """Does the next step: its phases, each for some seconds."""
    phases.step += 1
    for phase, seconds in parts:
        with phases(phase):
            clock.now_s += seconds


def test_a_new_phase_may_take_longer_and_a_known_one_the_floor(limits, phases, clock):
    for _ in range(WARM_UP):
        assert limits.limit_s("step") == PATIENCE * FLOOR_S
        spend(phases, clock, ("step", 0.1))
    assert limits.limit_s("step") == PATIENCE * FLOOR_S  # the last may not have ended
    spend(phases, clock, ("step", 0.1))
    assert limits.limit_s("step") == FLOOR_S
    assert limits.limit_s("data_wait") == PATIENCE * FLOOR_S


def test_a_limit_follows_the_longest_of_the_last_and_forgets(limits, phases, clock):
    spend(phases, clock, ("step", 30.0))
    for _ in range(REMEMBERED):
        spend(phases, clock, ("step", 0.1))
        assert limits.limit_s("step") >= MARGIN * 30.0 or phases.step < WARM_UP + 2
    spend(phases, clock, ("step", 0.1))
    assert limits.limit_s("step") == FLOOR_S


def test_the_parts_of_a_step_are_one_whatever_is_between(limits, phases, clock):
    for _ in range(WARM_UP + 1):
        spend(phases, clock, ("step", 1.0), ("data_wait", 0.5), ("step", 8.0))
    assert limits.limit_s("step") == MARGIN * 9.0


def test_compiling_and_what_others_do_has_no_limit(limits):
    assert limits.limit_s("compile") == limits.limit_s("other") == math.inf


def test_reading_and_writing_a_state_may_always_take_longer(limits, phases, clock):
    for _ in range(5):
        spend(phases, clock, ("save", 0.1))
    assert limits.limit_s("save") == PATIENCE * FLOOR_S


def test_without_a_floor_nothing_has_a_limit(phases, clock):
    limits = Limits(phases, 0, clock=clock)
    assert {limits.limit_s(phase) for phase in ("step", "save", "eval")} == {math.inf}


@pytest.mark.parametrize(
    ("late_one", "other"),
    [
        (("data_wait", 5), ("step", 5)),  # it has not given its part to the devices
        (("step", 4), ("step", 5)),
        (("other", 4), ("step", 5)),
        (("save", 5), ("step", 5)),
        (("step", 5), ("eval", 5)),  # an evaluation follows that step's update
        (("start", 0), ("restore", 0)),
    ],
)
def test_who_is_behind_is_late(late_one, other):
    signs = [Sign(LEAD, *other), Sign(ONE, *late_one), Sign(TWO, *other)]
    assert late(signs) == [signs[1]]


def test_the_silent_one_is_late_wherever_it_was():
    signs = [Sign(LEAD, "step", 5), Sign(ONE, "step", 6, silent_s=3.0)]
    assert late(signs) == [signs[1]]


def test_a_verdict_names_process_host_pid_phase_and_line():
    signs = [
        Sign(LEAD, "step", 7, 12.0),
        Sign(ONE, "data_wait", 7, 13.0, "jaxllm.run.run:9"),
    ]
    verdict = judge(signs)
    assert verdict is not None
    assert verdict.reason == (
        "process 1 (node1, pid 101) is waiting for the data of step 7 for 13.0 s, at "
        "jaxllm.run.run:9. The others wait for it: process 0 (node0, pid 100) is in "
        "step 7 for 12.0 s."
    )
    assert verdict.status == 75


def test_all_at_one_place_are_all_named():
    verdict = judge([Sign(who, "step", 7, 12.0) for who in (LEAD, ONE, TWO)])
    assert verdict is not None
    assert verdict.reason.startswith("no process is behind the others")
    assert all(str(who) in verdict.reason for who in (LEAD, ONE, TWO))


def test_one_that_compiles_is_waited_for_unless_it_says_nothing():
    waiting = Sign(LEAD, "step", 0, 99.0)
    assert judge([waiting, Sign(ONE, "compile", 0, 99.0)]) is None
    assert judge([waiting, Sign(ONE, "compile", 0, 9.0, silent_s=9.0)]) is not None


class Ended(BaseException):
    """Stands for the end of the process."""


class FakePeers(Peers):
    """Remembers what is said; the others say what a test says."""

    def __init__(self, me: Identity, others: list[Identity]):
        self.me, self.others, self.said = me, others, []

    @property
    def connected(self):
        return self.others

    def send(self, message):
        self.said.append(message)

    def receive(self, timeout_s):
        del timeout_s
        self.others = []  # whoever waits for their end has it
        return iter(())


def say(text: str):
    os.write(2, text.encode())


def end(status: int):
    raise Ended(status)


def watch(me: Identity, others: list[Identity], limits=None) -> Watchdog:
    return Watchdog(limits, 20.0, peers=FakePeers(me, others), say=say, end=end)


def said_by(watchdog: Watchdog) -> list[dict]:
    """Returns what it told the others."""
    assert isinstance(watchdog._peers, FakePeers)
    return watchdog._peers.said


def wait(watchdog: Watchdog, seconds: float, *signs: Sign) -> int | None:
    """Lets time pass, in which others say something; returns the status, if it ends."""
    try:
        for _ in range(round(seconds / TICK_S)):
            for sign in signs:
                watchdog.take(sign.who, sign.message())
            watchdog.advance(TICK_S)
    except Ended as ended:
        return ended.args[0]
    return None


def test_a_lone_process_ends_soon_after_its_limit_with_its_stacks(
    limits, phases, tmp_path, capfd
):
    watchdog = Watchdog(limits, 20.0, say=say, end=end)
    watchdog.workdir = tmp_path
    phases.step = 3
    with phases("data_wait"):
        assert wait(watchdog, PATIENCE * FLOOR_S - 1) is None
        assert wait(watchdog, 2) == 75
    said = capfd.readouterr().err
    assert "is waiting for the data of step 3 for 40." in said
    (path,) = (tmp_path / STALLS).iterdir()
    assert path.name.endswith("-process-0.txt")
    assert str(path) in said
    assert "test_a_lone_process_ends_soon" in path.read_text()


def test_progress_begins_the_time_again(limits, phases):
    watchdog = Watchdog(limits, 20.0, say=say, end=end)
    for _ in phases.each(range(5)):
        phases.begin("eval")
        assert wait(watchdog, PATIENCE * FLOOR_S - 1) is None


def test_time_in_which_the_process_was_stopped_does_not_count(limits, phases):
    watchdog = Watchdog(limits, 20.0, say=say, end=end)
    with phases("step"):
        for _ in range(3):
            watchdog.advance(1000.0)


def test_the_lead_waits_until_it_knows_where_the_others_are(limits, phases, capfd):
    watchdog = watch(LEAD, [ONE, TWO], limits)
    behind, level = Sign(TWO, "data_wait", 4), Sign(ONE, "step", 5)
    with phases("step"):
        phases.step = 5
        phases.begin("step")
        assert wait(watchdog, PATIENCE * FLOOR_S, level, behind) is None
        assert wait(watchdog, MISSED, level, behind) is None
        assert wait(watchdog, MISSED, level, behind) == 75
    said = capfd.readouterr().err
    assert "error: process 2 (node2, pid 102) is waiting for the data of step 4" in said
    assert said_by(watchdog)[-1]["verdict"]["status"] == 75


def test_a_stopped_process_is_blamed_after_some_beats(limits, phases, capfd):
    watchdog = watch(LEAD, [ONE, TWO], limits)
    with phases("step"):
        level = Sign(ONE, "step", 0)
        assert wait(watchdog, 1.0, level, Sign(TWO, "step", 0)) is None
        assert wait(watchdog, PATIENCE * FLOOR_S + 2 * MISSED, level) == 75
    said = capfd.readouterr().err
    assert "process 2 (node2, pid 102) has given no sign of life for 20." in said


def test_a_follower_leaves_the_verdict_to_the_lead(limits, phases):
    watchdog = watch(ONE, [LEAD], limits)
    with phases("step"):
        assert wait(watchdog, 200.0, Sign(LEAD, "compile")) is None
    assert any(said["is_overdue"] for said in said_by(watchdog))


def test_a_follower_blames_a_lead_that_says_nothing(limits, phases, capfd):
    watchdog = watch(ONE, [LEAD], limits)
    with phases("step"):
        assert wait(watchdog, 5.0, Sign(LEAD, "step", 1)) is None
        assert wait(watchdog, 21.0) == 75
    assert str(LEAD) in capfd.readouterr().err


@pytest.mark.parametrize(
    ("message", "status", "words"),
    [
        (None, 75, "process 1 (node1, pid 101) died"),
        ({"left": 2, "why": "no tokens"}, 2, "pid 101) ended with status 2: no tokens"),
    ],
)
def test_who_goes_takes_the_others_along(message, status, words, capfd):
    watchdog = watch(LEAD, [ONE, TWO])
    with pytest.raises(Ended, match=str(status)):
        watchdog.take(ONE, message)
    assert words in capfd.readouterr().err
    assert words in said_by(watchdog)[-1]["verdict"]["reason"]


def test_who_finishes_is_not_missed():
    watchdog = watch(LEAD, [ONE])
    watchdog.take(ONE, {"left": 0, "why": ""})
    watchdog.take(ONE, None)
    assert wait(watchdog, 60.0) is None


@contextlib.contextmanager
def meet(number: int) -> Iterator[list[Peers]]:
    """Connects some processes, which are all this one."""
    pairs = {identity(i): socket.socketpair() for i in range(1, number)}
    lead = Peers(identity(0), {who: Link(here) for who, (here, _) in pairs.items()})
    others = [Peers(who, {lead.me: Link(there)}) for who, (_, there) in pairs.items()]
    yield [lead, *others]
    for peers in (lead, *others):
        peers.close()


def receive(peers: Peers) -> list:
    return [(who.process, message) for who, message in peers.receive(5.0)]


def test_messages_go_between_the_lead_and_each_other_process():
    with meet(3) as (lead, one, two):
        one.send({"phase": "step"})
        assert receive(lead) == [(1, {"phase": "step"})]
        lead.send({"verdict": "x" * 10_000})
        assert receive(one) == receive(two) == [(0, {"verdict": "x" * 10_000})]
        assert one.connected[0].pid == lead.me.pid


def test_the_end_of_a_connection_is_seen_once_and_after_the_last_words():
    with meet(2) as (lead, one):
        one.send({"left": 1})
        one.close()
        heard = receive(lead) + receive(lead)
        assert heard == [(1, {"left": 1}), (1, None)]
        assert lead.connected == []


def test_half_a_line_waits_for_the_rest():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(ours)
        theirs.sendall(b'{"a": 1}\n{"b"')
        assert link.read() == ([{"a": 1}], True)
        theirs.sendall(b": 2}\n")
        assert link.read() == ([{"b": 2}], True)


def test_one_that_reads_nothing_holds_nobody_up():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(ours)
        for _ in range(1000):
            link.write({"text": "x" * 1000})


ABORTS = """
import ctypes, os, threading
from jaxllm.cluster.aborts import delay_aborts
delay_aborts()
threading.Timer(0.3, os._exit, (75,)).start()
ctypes.CDLL(None).abort()  # as C++ does it, without the interpreter's lock
"""


def test_an_abort_leaves_the_time_to_end_in_another_way():
    ended = subprocess.run([sys.executable, "-c", ABORTS], check=False)
    assert ended.returncode == 75


SAYS_LAST = """
import os
from jaxllm.cluster.aborts import say_last
os.write(2, b"before\\n")
say_last("error: why\\n")
os.write(2, b"after\\n")  # as C++ does it
"""


def test_nobody_writes_after_the_last_words():
    ended = subprocess.run(
        [sys.executable, "-c", SAYS_LAST], check=True, stderr=subprocess.PIPE
    )
    assert ended.stderr == b"before\nerror: why\n"
