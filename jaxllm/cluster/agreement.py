# SPDX-License-Identifier: Apache-2.0
"""Agreement between the processes of a run: the lead, broadcasts, and votes.

Process 0 leads: it alone writes data that is not a shard of a global array. In a run
of one process all of this is free.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.cluster.environment import describe_flags
from jaxllm.errors import InputError

_MESSAGE_BYTES = 4096
# First byte of a message of the lead: the kind of its error.
_INPUT_ERROR = "!"
_OTHER_ERROR = "?"


def describe() -> str:
    """Returns the devices, processes and flags of the run, as lines of the report."""
    device, number = jax.devices()[0], jax.process_count()
    processes = f"{number} processes" if number > 1 else "1 process"
    devices = f"{jax.device_count()} {device.device_kind} in {processes}"
    return f"{'devices':<16} {devices}{describe_flags(os.environ)}"


def is_lead() -> bool:
    """Returns whether this process leads and writes for all."""
    return jax.process_index() == 0


def on_lead(action: Callable[[], Any]) -> None:
    """Runs action on the leading process; the others wait until it is done.

    Raises:
      InputError: on every process, with the message of the leading one.
      RuntimeError: on the others, if it failed in another way.
    """
    error = None
    if is_lead():
        try:
            action()
        except Exception as caught:
            if jax.process_count() == 1:
                raise
            error = caught
    if jax.process_count() == 1:
        return
    kind = _INPUT_ERROR if isinstance(error, InputError) else _OTHER_ERROR
    message = text_of_lead("" if error is None else f"{kind}{error}")
    if error is not None:
        raise error
    if message:
        kind = InputError if message.startswith(_INPUT_ERROR) else RuntimeError
        raise kind(message[1:])


def of_lead(number: int) -> int:
    """Returns the leading process's number on every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def text_of_lead(text: str) -> str:
    """Returns the leading process's text, of 4 KiB at most, on every process."""
    data = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = text.encode()[:_MESSAGE_BYTES]
    data[: len(encoded)] = list(encoded)
    received = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return bytes(received).rstrip(b"\0").decode(errors="replace")


class Poll:
    """Asks every process a yes-or-no question once a step, without blocking.

    The answer is one step late: it arrives with the results of the previous step. Every
    process gets the same answer at the same step.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._pending: jax.Array | None = None
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        place = jax.NamedSharding(mesh, jax.P(mesh.axis_names))

        def votes(value: int) -> jax.Array:
            part = np.full(mesh.size, value, np.int32)
            return jax.make_array_from_callback(part.shape, place, lambda i: part[i])

        self._votes = {False: votes(0), True: votes(1)}
        add = jax.jit(lambda v: v.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
        with jax.set_mesh(mesh):
            self._add = add.lower(self._votes[False]).compile()

    def __call__(self, answer: bool) -> bool:
        """Returns whether any process answered yes in the previous step."""
        if self._alone:
            return answer
        before, self._pending = self._pending, self._add(self._votes[answer])
        return before is not None and int(jax.device_get(before)) > 0
