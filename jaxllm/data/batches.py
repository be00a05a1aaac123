# SPDX-License-Identifier: Apache-2.0
"""Batches: rows on the devices, made ahead of the steps that use them.

A batch is a pure function of the tokens, the settings, the seed and the step; the only
state is the number of the step. Each process reads the rows that its devices hold, in a
thread that also starts their transfer.
"""

import dataclasses
import math
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.cluster.memory import check_room, device_bytes, host_bytes
from jaxllm.config import DataConfig
from jaxllm.data.formats import TokenSplit
from jaxllm.data.mixture import mix_rows
from jaxllm.data.packing import BATCH_NAMES, PackedSplit, Rows, empty_rows
from jaxllm.errors import InputError
from sharding import Placement

FOREVER = 2**40  # steps of a stream without end
_ARRAY_BYTES = 4096  # of a small array, beside its values
_POLL_S = 0.1  # between two looks at whether to stop
_LEAVE_S = 5  # for the batch under way, as the program ends

Batch = dict[str, jax.Array]  # of BATCH_NAMES: int32 [B, T]
Find = Callable[[int], tuple[int, int] | None]  # n -> path and row there; None: padding


def batch_of(step: int, left_out: Sequence[int]) -> int:
    """Returns the number of a step's batch: they follow one another, but for some.

    Args:
      step: of the run, from 0.
      left_out: numbers of batches, ascending.
    """
    number = step
    for batch in left_out:
        number += batch <= number
    return number


class Batches:
    """An iterator over batches; `close` stops the thread that makes them.

    The thread begins with the first batch that is asked for, and is `prefetch` batches
    ahead. It never keeps a program from ending, even if a read of it hangs.
    """

    def __init__(self, steps: "_Steps", start: int, prefetch: int):
        self.steps = steps
        self._made: queue.Queue[Any] = queue.Queue(prefetch)
        self._closed = threading.Event()
        self._over = False  # there are no more to take
        arguments = steps, start, self._made, self._closed
        self._thread = threading.Thread(
            target=_make, args=arguments, name="batches", daemon=True
        )
        # Not killed while it uses JAX, as the program ends.
        weakref.finalize(self, _end, self._thread, self._closed)

    @property
    def splits(self) -> list[TokenSplit]:
        """The tokens that the batches are made of."""
        return [packed.split for packed in self.steps.packed]

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = self.wait(lambda: False)
        assert batch is not None, "nothing stops it"
        return batch

    def wait(self, should_stop: Callable[[], bool]) -> Batch | None:
        """Returns the next batch, or None if it should stop before that is there.

        Raises:
          StopIteration: there are no more.
        """
        if self._over:
            raise StopIteration
        if not self._thread.ident:
            self._thread.start()
        while True:
            try:
                made = self._made.get(timeout=_POLL_S)
            except queue.Empty:
                if should_stop():
                    return None
                continue
            if isinstance(made, BaseException):
                self._over = True
                raise made
            return made

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Stops making batches; there are no more to take."""
        self._over = True
        self._closed.set()


def _make(
    steps: "_Steps", start: int, made: queue.Queue[Any], closed: threading.Event
) -> None:
    """Puts one batch after the other into a queue, then StopIteration, or an error."""
    for number in range(start, len(steps) + 1):
        try:
            batch = steps[number] if number < len(steps) else StopIteration()
        except BaseException as error:
            batch = error
        while not closed.is_set():
            try:
                made.put(batch, timeout=_POLL_S)
                break
            except queue.Full:
                pass
        if closed.is_set() or isinstance(batch, BaseException):
            return


def _end(thread: threading.Thread, closed: threading.Event) -> None:
    closed.set()
    if thread.is_alive():
        thread.join(_LEAVE_S)


def load_batches(
    config: DataConfig,
    packed: Sequence[PackedSplit],
    *,
    seed: int,
    sharding: jax.sharding.NamedSharding | None,
    start: int = 0,
    left_out: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Batches:
    """Returns the batches of steps start, start + 1, ... for ever.

    Args:
      config: how rows become batches.
      packed: the rows of each of `config.data.paths`.
      seed: of the order of the rows; from 0 to 2**32 - 1.
      sharding: of "BT"; None places batches on the default device.
      start: steps done before.
      left_out: numbers of batches that no step is given, ascending; the others follow
        one another.
      vocab_size: refuse batches with a token that is not below it.
    """
    mixture = mix_rows(
        [len(rows) for rows in packed],
        config.weights,
        seed=seed,
        shuffle=config.shuffle,
    )
    shape = config.batch_size, config.sequence_length
    placement = Placement.of(shape, sharding)
    steps = _Steps(packed, mixture.row, FOREVER, placement, vocab_size, tuple(left_out))
    return Batches(steps, start, config.prefetch)


def eval_batches(
    config: DataConfig,
    packed: Sequence[PackedSplit],
    *,
    sharding: jax.sharding.NamedSharding | None,
    num_batches: int,
    vocab_size: int | None = None,
) -> Batches:
    """Returns the same batches at every call, with each row at most once.

    Splits follow one another, whatever `config.data.weights` says. The last batch is
    filled up with rows of padding, so that a mean over all targets is exact.

    Args:
      config: how rows become batches.
      packed: the rows of the held-out splits, their tails included.
      sharding: of "BT"; None places batches on the default device.
      num_batches: at most so many, with rows evenly spread over all; 0 is every row.
      vocab_size: refuse batches with a token that is not below it.
    """
    ends = np.cumsum([len(rows) for rows in packed])
    total = int(ends[-1])
    num_rows = min(total, num_batches * config.batch_size) if num_batches else total

    def find(n: int) -> tuple[int, int] | None:
        if n >= num_rows:
            return None
        row = n * total // num_rows
        path = int(np.searchsorted(ends, row, side="right"))
        return path, row - int(ends[path]) + len(packed[path])

    num_steps = -(-num_rows // config.batch_size)
    shape = config.batch_size, config.sequence_length
    placement = Placement.of(shape, sharding)
    steps = _Steps(packed, find, num_steps, placement, vocab_size)
    return Batches(steps, 0, config.prefetch)


def check_memory(
    config: DataConfig, sharding: jax.sharding.NamedSharding | None
) -> None:
    """Refuses batches that, made ahead as `config.data.prefetch` says, have no room.

    They may take half of the memory of a device or, where devices share the host's, of
    what that has left: `prefetch` batches, one under way and the one of the step.
    """
    whole = config.batch_size, config.sequence_length
    part, devices = whole, jax.local_devices()[:1]
    if sharding is not None:
        part, devices = sharding.shard_shape(whole), list(sharding.addressable_devices)
    one = len(BATCH_NAMES) * (
        np.dtype(np.int32).itemsize * math.prod(part) + _ARRAY_BYTES
    )
    there = device_bytes(devices[0])
    if there is None:
        one, there = one * len(devices), host_bytes()
    there //= 2
    fitting = there // one - 2
    remedy = (
        f"use config.data.prefetch={fitting} or less"
        if fitting > 0
        else "lower config.data.batch_size or config.data.sequence_length"
    )
    what = (
        f"config.data.prefetch={config.prefetch} batches of config.data.batch_size="
        f"{whole[0]} rows of {whole[1]} tokens"
    )
    check_room(what, one * (config.prefetch + 2), there, remedy)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batch by step: what the thread reads from."""

    packed: Sequence[PackedSplit]
    find: Find
    num_steps: int
    placement: Placement
    vocab_size: int | None
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: int) -> Batch:
        return self.placement.place(self.read(index))

    def read(self, step: int) -> Rows:
        """Returns the rows of a step that this process needs."""
        batch_size, sequence_length = self.placement.shape
        batch = batch_of(step, self.left_out)
        numbers = (batch * batch_size + self.placement.rows).tolist()
        found = [self.find(number) or (-1, 0) for number in numbers]
        paths, rows = np.array(found).T
        held = empty_rows(len(found), sequence_length)
        for path in np.unique(paths[paths >= 0]).tolist():
            read = self.packed[path].read(rows[paths == path])
            self._check_tokens(read, self.packed[path].split)
            for name, values in read.items():
                held[name][paths == path] = values
        return held

    def _check_tokens(self, rows: Rows, split: TokenSplit):
        if self.vocab_size is None:
            return
        largest = max(int(rows["tokens"].max()), int(rows["targets"].max()))
        smallest = int(rows["tokens"].min())
        if largest >= self.vocab_size or smallest < 0:
            wrong = smallest if smallest < 0 else largest
            raise InputError(
                f"{split.path} has the token {wrong}, which is not from 0 to "
                f"config.model.vocab_size={self.vocab_size} less 1; set it to the "
                "vocabulary of the tokenizer that made this file, or give another file."
            )
