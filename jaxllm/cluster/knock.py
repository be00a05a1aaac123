# SPDX-License-Identifier: Apache-2.0
"""How a process that does not lead comes through the door of its run."""

import contextlib
import dataclasses
import json
import secrets
import socket
import time
from typing import Any

from jaxllm.cluster.door import GRACE_S
from jaxllm.cluster.launch import COORDINATOR, JOB, Launch, write_address
from jaxllm.cluster.peers import Identity, Link, Peers, identity
from jaxllm.cluster.proof import LINE_BYTES, key_of, seal, unseal
from jaxllm.errors import InputError

_RETRY_S = 0.2  # between two attempts
_ANSWER_S = 5.0  # for whoever opens to say who it is
_OTHER_LANGUAGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Refused(Exception):
    """Who listens at the address of the lead will not let this process in."""


def knock(launch: Launch, timeout_s: float) -> tuple[Peers, str]:
    """Returns the connection of this process to the lead, and the address of JAX.

    It tries again until the lead is there.

    Raises:
      InputError: another run is at the address, which was given by hand.
      TimeoutError: the processes did not meet in time.
    """
    began_s = time.monotonic()
    end_s, refused_s, why = began_s + timeout_s, None, "nothing listens there"
    while time.monotonic() < end_s:
        for port in launch.ports:
            try:
                return _enter(launch, port, end_s)
            except Refused as refusal:
                why = str(refusal)
                refused_s = refused_s or time.monotonic()
                # The run that is there may be an earlier start of this one, which ends.
                if launch.is_by_hand and time.monotonic() - refused_s > GRACE_S:
                    raise InputError(why) from refusal
            except OSError as error:
                why, refused_s = f"{type(error).__name__}: {error}", None
            except _OTHER_LANGUAGE:
                why, refused_s = "what listens there is not the lead of a run", None
        time.sleep(_RETRY_S)
    raise TimeoutError(why)


def _enter(launch: Launch, port: int, end_s: float) -> tuple[Peers, str]:
    """Enters by the door at a port; raises anything if something else is there."""
    me, key = identity(launch.process_id), key_of(launch.job)
    connection = socket.create_connection((launch.host, port), timeout=_ANSWER_S)
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        until_s = min(time.monotonic() + _ANSWER_S, end_s)
        nonce = secrets.token_hex(16)
        hello = {
            "nonce": nonce,
            "who": dataclasses.asdict(me),
            "number": launch.num_processes,
        }
        theirs = _line(connection, until_s)["nonce"]
        connection.sendall(seal(key, theirs, hello))
        answer = _line(connection, until_s)
        address = f"{launch.host}:{port}"
        if answer.get("refused"):
            raise Refused(
                f"{COORDINATOR}={address} is the address of another run; give this one "
                f"a port of its own, or the same {JOB} in all of its processes."
            )
        welcome = unseal(key, nonce, json.dumps(answer).encode())
        if welcome is None:
            raise ValueError("it claims to be the lead, and does not know the job")
        if welcome["refused"]:
            raise Refused(
                f"{COORDINATOR}={address}: {welcome['refused']}. If this process is of "
                "another run, give that one a port of its own; a process that was "
                "lost comes back with all others."
            )
        service = _line(connection, end_s)["service"]
        host = connection.getpeername()[0]
        stack.pop_all()
    peers = Peers(me, {Identity(**welcome["who"]): Link(connection)})
    return peers, write_address(host, service)


def _line(connection: socket.socket, until_s: float) -> dict[str, Any]:
    """Returns the next message, and reads not a byte more."""
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.01, until_s - time.monotonic()))
        data = connection.recv(1)
        if not data:
            raise ConnectionError("the connection has ended")
        line += data
        if len(line) > LINE_BYTES or time.monotonic() > until_s:
            raise ValueError("no line comes to its end")
    return json.loads(line)
