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
import selectors
import socket
from collections.abc import Iterator, Mapping
from typing import Any

Message = dict[str, Any]

_READ_BYTES = 2**16


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
