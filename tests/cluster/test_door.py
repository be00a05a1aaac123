# SPDX-License-Identifier: Apache-2.0
"""The processes of a run meet at a door that lets in nobody else, at any time."""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from jaxllm.cluster import door, knock
from jaxllm.cluster.door import Door
from jaxllm.cluster.launch import Launch
from jaxllm.cluster.peers import Peers
from jaxllm.errors import InputError

LIMIT_S = 20
# What a scanner, a browser, a broken client, JAX's own protocol and nobody at all say.
STRANGERS = {
    "noise": os.urandom(10_000),
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "nothing": b"",
    "half": b'{"body": "',
    "empty": b"{}\n",
    "list": b"[]\n",
    "null": b"null\n",
    "deep": b"[" * 4000 + b"\n",
    "numbers": b'{"body": 1, "proof": 2}\n',
    "text": b'{"body": "{}", "proof": "\xc3\xa9"}\n',
    "not text": b"\xff\xfe\n",
}


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(door, "GRACE_S", 0.3)
    monkeypatch.setattr(knock, "GRACE_S", 0.3)
    yield
    while Coming.all:
        Coming.all.pop().end()


@pytest.fixture
def launch() -> Launch:
    """The launch of process 0 of three."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Launch("127.0.0.1", (free.getsockname()[1],), 3, 0, "ours")


@pytest.fixture
def opened(launch) -> Iterator[Door]:
    with contextlib.closing(Door(launch)) as made:
        yield made


class Coming(threading.Thread):
    """A process that knocks; what came of it."""

    all: ClassVar[list["Coming"]] = []

    def __init__(self, launch: Launch, process: int, **changes):
        super().__init__(daemon=True)
        self._launch = dataclasses.replace(launch, process_id=process, **changes)
        self.error: Exception | None = None
        self.service = ""
        self.peers: Peers | None = None
        self.all.append(self)
        self.start()

    def run(self):
        try:
            self.peers, self.service = knock.knock(self._launch, LIMIT_S)
        except Exception as error:
            self.error = error

    def end(self):
        """Closes its connection, once it has come in or was refused."""
        self.join(LIMIT_S)
        if self.peers is not None:
            self.peers.close()

    def refusal(self) -> str:
        """Returns why it was not let in."""
        self.join(LIMIT_S)
        assert isinstance(self.error, InputError), (self.error, self.service)
        return str(self.error)


def connect(launch: Launch) -> socket.socket:
    return socket.create_connection((launch.host, launch.ports[0]), timeout=LIMIT_S)


def meet(opened: Door, launch: Launch):
    """Lets all processes in, and guards the door from then on."""
    coming = [Coming(launch, process) for process in (1, 2)]
    peers = opened.gather(LIMIT_S)
    with opened.reserve() as reserved:
        service = reserved.getsockname()[1]
        peers.send({"service": service})
        opened.guard()
    for each in coming:
        each.join(LIMIT_S)
        assert each.service == f"127.0.0.1:{service}", each.error
    peers.close()


def test_processes_meet_in_any_order(launch):
    early = Coming(launch, 2)
    time.sleep(0.2)
    with contextlib.closing(Door(launch)) as opened:
        late = Coming(launch, 1)
        peers = opened.gather(LIMIT_S)
        peers.send({"service": 4})
        for each in (early, late):
            each.join(LIMIT_S)
            assert each.service == "127.0.0.1:4"
        assert sorted(who.process for who in peers.connected) == [1, 2]
        assert early.peers is not None
        early.peers.send({"said": 1})
        received = [message for _, message in peers.receive(LIMIT_S)]
        assert received == [{"said": 1}]
        peers.close()


def test_the_port_of_jax_is_bound_to_the_address_by_which_all_have_come(opened, launch):
    meet(opened, launch)
    with opened.reserve() as reserved:
        assert reserved.getsockname()[0] == "127.0.0.1"
    opened._addresses.add("10.0.0.1")  # as if another had come by it
    with opened.reserve() as reserved:
        assert reserved.getsockname()[0] in ("::", "0.0.0.0")


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_neither_stop_a_meeting_nor_end_a_run(name, opened, launch):
    with contextlib.ExitStack() as stack:

        def come():
            for _ in range(door._MOST_ASKING + 10):
                stranger = stack.enter_context(connect(launch))
                with contextlib.suppress(OSError):  # dropped to make room
                    stranger.sendall(STRANGERS[name])

        before = threading.Thread(target=come)
        before.start()
        meet(opened, launch)
        before.join()
        come()
        assert "already" in Coming(launch, 1).refusal()  # the door is still there


def test_one_who_says_a_letter_a_second_stops_nobody(opened, launch, monkeypatch):
    monkeypatch.setattr(door, "_ANSWER_S", 0.5)
    with connect(launch) as slow:
        opened._attend()
        slow.sendall(b"{")
        meet(opened, launch)
        slow.settimeout(LIMIT_S)
        end_s = time.monotonic() + LIMIT_S
        with contextlib.suppress(ConnectionError):
            while slow.recv(1000):  # it is dropped
                assert time.monotonic() < end_s
                slow.sendall(b" ")


@pytest.mark.parametrize(
    ("process", "changes", "why"),
    [
        (1, {"job": "theirs"}, "is the address of another run"),
        (1, {"num_processes": 4}, "has 3 processes, not JAXLLM_NUM_PROCESSES=4"),
        (3, {}, "JAXLLM_PROCESS_ID=3 is not from 1 to 2"),
        (1, {}, "has its process 1 ("),
    ],
)
def test_other_processes_are_refused_before_and_after_the_meeting(
    process, changes, why, opened, launch
):
    others = [Coming(launch, process, **changes)] if changes or process == 3 else []
    meet(opened, launch)
    others.append(Coming(launch, process, **changes))
    for other in others:
        assert why in other.refusal()
        assert f"{launch.address}" in other.refusal()
        assert "a port of its own" in other.refusal()


def test_of_two_with_one_number_the_second_is_refused(opened, launch):
    twice = [Coming(launch, 1), Coming(launch, 1)]
    with pytest.raises(TimeoutError, match="no sign of process 2; refused: process 1"):
        opened.gather(2)
    assert len([each for each in twice if isinstance(each.error, InputError)]) == 1
    Coming(launch, 2)
    opened.gather(LIMIT_S).close()  # so that the other one ends, too


def test_a_process_that_ends_before_all_have_met_may_come_again(opened, launch):
    one = dataclasses.replace(launch, process_id=1)
    opened.guard()
    for _ in range(2):  # it comes, gives up, and its connection is closed
        with pytest.raises(TimeoutError, match="timed out"):
            knock.knock(one, 1)
    opened.close()
    assert opened._missing() == [1, 2]


def test_a_second_lead_is_refused_and_a_later_one_may_listen(opened, launch):
    with pytest.raises(InputError, match=r"cannot listen there.*a free port"):
        Door(launch)
    opened.close()
    Door(launch).close()


def test_a_lead_of_slurm_takes_another_port_where_others_find_it(opened, launch):
    (taken,) = launch.ports
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    job = dataclasses.replace(
        launch, ports=(taken, other), job="another", is_by_hand=False
    )
    opened.guard()
    with contextlib.closing(Door(job)) as second:
        assert second.port == other
        coming = [Coming(job, process) for process in (1, 2)]
        peers = second.gather(LIMIT_S)
        peers.send({"service": 4})
        for each in coming:
            each.join(LIMIT_S)
            assert each.service == "127.0.0.1:4"
        peers.close()


def test_a_lead_that_does_not_know_the_job_is_not_believed(launch):
    """A stranger took the port: the processes wait, and tell it nothing."""
    with socket.create_server((launch.host, launch.ports[0])) as server:

        def pretend():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b'{"nonce": "a"}\n')
                connection.recv(1000)
                connection.sendall(b'{"body": "{}", "proof": "b"}\n{"service": 1}\n')

        threading.Thread(target=pretend, daemon=True).start()
        other = dataclasses.replace(launch, process_id=1)
        with pytest.raises(TimeoutError):
            knock.knock(other, 1.5)
