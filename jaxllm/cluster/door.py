# SPDX-License-Identifier: Apache-2.0
"""The door of a run: the port at which its processes meet, and nobody else gets in.

JAX's coordination service trusts whoever reaches it: a process of another run that is
given the same address ends this one. So that port is the door instead. Only who proves
to know the name of the job learns where JAX's service is. Everybody else is refused, at
any time: another run, a process that comes late or twice, a port scanner.

The port stays open, so that no other run can take it for its own.
"""

import collections
import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time

from jaxllm.cluster.launch import COORDINATOR, NUM_PROCESSES, PROCESS_ID, Launch
from jaxllm.cluster.peers import Identity, Link, Peers, identity
from jaxllm.cluster.proof import LINE_BYTES, key_of, seal, unseal
from jaxllm.errors import InputError

GRACE_S = 5.0  # for an earlier start of the same run to end
_RETRY_S = 0.2  # between two attempts to listen
_ANSWER_S = 5.0  # for whoever knocks to say who it is
_MOST_ASKING = 64  # connections of which that is not known; the oldest makes room
_TICK_S = 0.2
_TAKEN = ", perhaps because another run does"
_SHOWN = 4  # of those who are missing, or were refused, in a message

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Asking:
    """A connection that has not proved yet to be of this run."""

    nonce: str
    until_s: float
    said: bytes = b""


class Door:
    """The door of the leading process; it listens from the start.

    Raises:
      InputError: the port was given by hand, and is in use.
      OSError: no port of those that SLURM's job may have is free.
    """

    def __init__(self, launch: Launch):
        self._launch, self._key, self._me = launch, key_of(launch.job), identity(0)
        self._server = _listen(launch)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._asking: dict[socket.socket, _Asking] = {}  # the oldest first
        self._links: dict[Identity, Link] = {}
        self._refused: collections.deque[str] = collections.deque(maxlen=_SHOWN)
        self._addresses: set[str] = set()  # of this host, as the others reached it
        self._guard: threading.Thread | None = None
        self._is_closed = False

    @property
    def port(self) -> int:
        """The port of the door."""
        return self._server.getsockname()[1]

    def gather(self, timeout_s: float) -> Peers:
        """Returns the connections to all other processes of the run.

        Raises:
          TimeoutError: some did not come in time.
        """
        end_s = time.monotonic() + timeout_s
        while missing := self._missing():
            if time.monotonic() > end_s:
                names = ", ".join(map(str, missing[:_SHOWN]))
                more = f" and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else ""
                refused = "; refused: ".join(["", *self._refused])
                raise TimeoutError(f"no sign of process {names}{more}{refused}")
            self._attend()
        for link in self._links.values():
            self._selector.unregister(link)
        return Peers(self._me, self._links)

    def reserve(self) -> socket.socket:
        """Returns a socket that keeps a port for JAX's service until that listens.

        It is bound to one address of this host if all others came by that one.
        """
        either = socket.has_dualstack_ipv6()
        host = min(self._addresses) if len(self._addresses) == 1 else ""
        version_6 = ":" in host or (not host and either)
        reserved = socket.socket(socket.AF_INET6 if version_6 else socket.AF_INET)
        # With this option JAX's service, which has it too, may listen meanwhile.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, 0))
        return reserved

    def guard(self) -> None:
        """Refuses everybody from now on, in a thread."""
        self._guard = threading.Thread(target=self._stand, daemon=True)
        self._guard.start()

    def close(self) -> None:
        """Frees the port, for the next start of the run; who was let in stays."""
        self._is_closed = True
        self._server.close()
        if self._guard is not None:
            self._guard.join()
        for connection in list(self._asking):
            self._drop(connection)
        self._selector.close()

    def _missing(self) -> list[int]:
        others = set(range(1, self._launch.num_processes))
        return sorted(others - {who.process for who in self._links})

    def _stand(self) -> None:
        while not self._is_closed:
            try:
                self._attend()
            except Exception:
                if not self._is_closed:  # the run does not need the door any more
                    _log.exception("the door of the run is closed")
                    self._server.close()
                    return

    def _attend(self) -> None:
        """Handles what has arrived, and waits a moment for it."""
        for key, _ in self._selector.select(_TICK_S):
            if key.fileobj is self._server:
                self._accept()
            elif isinstance(key.data, Identity):
                self._lose(key.data)
            elif key.data in self._asking:  # not dropped meanwhile to make room
                self._hear(key.data)
        now_s = time.monotonic()
        for connection in [c for c, a in self._asking.items() if a.until_s < now_s]:
            self._drop(connection)

    def _accept(self) -> None:
        if len(self._asking) >= _MOST_ASKING:
            self._drop(next(iter(self._asking)))
        try:
            connection, _ = self._server.accept()
        except OSError:  # it has gone, or this process has too many open files
            time.sleep(0.01)
            return
        connection.setblocking(False)
        asking = _Asking(secrets.token_hex(16), time.monotonic() + _ANSWER_S)
        self._asking[connection] = asking
        self._selector.register(connection, selectors.EVENT_READ, connection)
        self._say(connection, json.dumps({"nonce": asking.nonce}).encode() + b"\n")

    def _hear(self, connection: socket.socket) -> None:
        asking = self._asking[connection]
        try:
            data = connection.recv(LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        asking.said += data
        if not data or len(asking.said) > LINE_BYTES:
            self._drop(connection)
        elif b"\n" in asking.said:
            self._answer(connection, asking)

    def _answer(self, connection: socket.socket, asking: _Asking) -> None:
        """Lets in whoever has proved to be of this run and is missing in it."""
        try:
            line = asking.said.partition(b"\n")[0]
            hello = unseal(self._key, asking.nonce, line)
            who = Identity(**hello["who"]) if hello else None
        except (ValueError, TypeError, KeyError, RecursionError):
            self._drop(connection)  # it does not speak as we do
            return
        if hello is None or who is None:
            self._refuse(connection, b'{"refused": true}\n', "a process of another run")
            return
        why = self._reason(who, hello["number"])
        answer = {"refused": why, "who": dataclasses.asdict(self._me)}
        line = seal(self._key, hello["nonce"], answer)
        if why:
            self._refuse(connection, line, str(who))
        elif self._say(connection, line):
            self._asking.pop(connection)
            self._addresses.add(_address(connection))
            self._links[who] = Link(connection)
            self._selector.modify(connection, selectors.EVENT_READ, who)

    def _reason(self, who: Identity, number: int) -> str:
        """Returns why a process with the name of the job is not let in, or nothing."""
        here = self._launch.num_processes
        if number != here:
            return f"the run has {here} processes, not {NUM_PROCESSES}={number}"
        if not 0 < who.process < here:
            return f"{PROCESS_ID}={who.process} is not from 1 to {here - 1}"
        if same := [other for other in self._links if other.process == who.process]:
            return f"the run has its {same[0]} already"
        return ""

    def _refuse(self, connection: socket.socket, line: bytes, who: str) -> None:
        self._refused.append(who)
        if self._say(connection, line):
            self._drop(connection)

    def _lose(self, who: Identity) -> None:
        """Forgets a process that has ended, or speaks before it was spoken to."""
        self._selector.unregister(self._links[who])
        self._links.pop(who).close()

    def _say(self, connection: socket.socket, line: bytes) -> bool:
        """Sends a line, which fits into the buffer of a new connection."""
        with contextlib.suppress(OSError):
            if connection.send(line) == len(line):
                return True
        self._drop(connection)
        return False

    def _drop(self, connection: socket.socket) -> None:
        self._asking.pop(connection)
        self._selector.unregister(connection)
        connection.close()


def _listen(launch: Launch) -> socket.socket:
    """Returns a socket that listens at the first free port of a launch."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    end_s, ports = time.monotonic() + GRACE_S, itertools.cycle(launch.ports)
    while True:
        try:
            return socket.create_server(
                ("", next(ports)), family=family, backlog=1024, dualstack_ipv6=both
            )
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            if is_taken and time.monotonic() < end_s:
                time.sleep(_RETRY_S)
            elif not launch.is_by_hand:
                raise
            else:
                why = os.strerror(error.errno or 0)
                raise InputError(
                    f"{COORDINATOR}={launch.address}: process 0 cannot listen there "
                    f"({why}){_TAKEN if is_taken else ''}; give this run a free port "
                    "of its own."
                ) from error


def _address(connection: socket.socket) -> str:
    """Returns the address of this end, IPv4 as such."""
    return connection.getsockname()[0].removeprefix("::ffff:")
