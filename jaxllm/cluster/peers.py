# SPDX-License-Identifier: Apache-2.0
"""TCP connections between the leading process and every other one, besides JAX's.

When a process is killed, the kernel closes its connection, and the other end knows at
once. A process that is stopped or cut off sends no more heartbeats. JAX has heartbeats
too, but they do not tell which process is late, and they abort uncatchably.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

Message = dict[str, Any]

_READ_BYTES = 2**16
_HELLO_S = 5.0  # for the first line of a new connection


@dataclasses.dataclass(frozen=True)
class Identity:
    """A process of the run, with the host and pid that an administrator needs."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} ({self.host}, pid {self.pid})"


def identity(process: int) -> Identity:
    """Returns the identity of this process."""
    return Identity(process, socket.gethostname(), os.getpid())


class Link:
    """A non-blocking connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._socket = connection
        self._rest = self._unsent = b""

    def fileno(self) -> int:
        """Returns the file descriptor, for a selector."""
        return self._socket.fileno()

    def read(self) -> tuple[list[Message], bool]:
        """Returns the messages received so far, and whether the connection is open."""
        is_open = True
        try:
            data = self._socket.recv(_READ_BYTES)
            is_open = bool(data)
        except BlockingIOError:
            data = b""
        except OSError:
            data, is_open = b"", False
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines], is_open

    def write(self, message: Message) -> None:
        """Sends a message; drops it if the other end is gone or no longer reads."""
        if len(self._unsent) < _READ_BYTES:
            self._unsent += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def close(self) -> None:
        """Closes the connection; the other end notices."""
        self._socket.close()


class Peers:
    """The processes that this one is connected to: all if it leads, else the lead.

    Attributes:
      me: this process.
    """

    def __init__(self, me: Identity, links: Mapping[Identity, Link]):
        self.me = me
        self._links = dict(links)
        self._selector = selectors.DefaultSelector()
        for peer, link in self._links.items():
            self._selector.register(link, selectors.EVENT_READ, peer)

    @property
    def connected(self) -> list[Identity]:
        """The processes whose connections are open."""
        return list(self._links)

    def receive(self, timeout_s: float) -> Iterator[tuple[Identity, Message | None]]:
        """Yields the messages that arrive in time; None marks a closed connection."""
        for key, _ in self._selector.select(timeout_s):
            peer: Identity = key.data
            messages, is_open = self._links[peer].read()
            yield from ((peer, message) for message in messages)
            if not is_open:
                self._selector.unregister(self._links[peer])
                self._links.pop(peer).close()
                yield peer, None

    def send(self, message: Message) -> None:
        """Sends a message to all connected processes."""
        for link in self._links.values():
            link.write(message)

    def close(self) -> None:
        """Closes all connections."""
        self._selector.close()
        for link in self._links.values():
            link.close()


class Meeting:
    """The port on which the leading process accepts all others.

    Attributes:
      invitation: port, token and identity of the lead, for `come`.
    """

    def __init__(self):
        self._me = identity(0)
        self._token = secrets.token_hex(8)  # keeps strangers and other runs out
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=both
        )
        port = self._server.getsockname()[1]
        self.invitation = f"{port} {self._token} {self._me.host} {self._me.pid}"

    def gather(self, number: int, timeout_s: float) -> Peers:
        """Returns the connections to all other processes.

        Raises:
          TimeoutError: some did not connect in time.
        """
        end_s, links = time.monotonic() + timeout_s, {}
        with self._server:
            while len(links) < number - 1:
                try:
                    self._server.settimeout(max(0.1, end_s - time.monotonic()))
                    connection, _ = self._server.accept()
                except TimeoutError as error:
                    missing = set(range(1, number)) - {peer.process for peer in links}
                    raise TimeoutError(
                        f"the processes {sorted(missing)} did not connect to the "
                        f"leading one within {timeout_s:.0f} s."
                    ) from error
                peer = _introduction(connection, self._token)
                if peer is None:
                    connection.close()
                else:
                    links[peer] = Link(connection)
        return Peers(self._me, links)


def come(invitation: str, host: str, process: int, timeout_s: float) -> Peers:
    """Returns the connection of this process, which does not lead, to the lead.

    Args:
      invitation: of the lead's `Meeting`.
      host: an address of its host.
      process: of this process.
      timeout_s: time limit for connecting.
    """
    port, token, name, pid = invitation.split()
    me = identity(process)
    connection = socket.create_connection((host, int(port)), timeout=timeout_s)
    hello = {"token": token, **dataclasses.asdict(me)}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    return Peers(me, {Identity(0, name, int(pid)): Link(connection)})


def _introduction(connection: socket.socket, token: str) -> Identity | None:
    """Returns who connected, by the first line; None if not a process of this run."""
    line = b""
    try:
        connection.settimeout(_HELLO_S)
        while not line.endswith(b"\n") and len(line) < _READ_BYTES:
            data = connection.recv(1)
            line += data or b"\n"
        hello = json.loads(line)
        return Identity(**hello) if hello.pop("token") == token else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
