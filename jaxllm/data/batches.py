# SPDX-License-Identifier: Apache-2.0
"""Batches: rows on the devices, made ahead of the steps that use them.

A batch is a pure function of the tokens, the settings, the seed and the step; the only
state is the number of the step. Each process reads the rows that its devices hold, in a
thread that also starts their transfer.
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data.formats import TokenSplit
from jaxllm.data.mixture import mix_rows
from jaxllm.data.packing import PackedSplit, Rows, empty_rows, pack
from jaxllm.errors import InputError
from sharding import Placement

FOREVER = 2**40  # steps of a stream without end

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
    """An iterator over batches; `close` stops the thread that makes them."""

    def __init__(self, steps: "_Steps", start: int, prefetch: int):
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self.steps = steps
        dataset = grain.MapDataset.source(steps)[start:]
        self._batches = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Stops making batches; there are no more to take."""
        self._batches.close()


def load_batches(
    config: DataConfig,
    splits: Sequence[TokenSplit],
    *,
    seed: int,
    sharding: jax.sharding.NamedSharding | None,
    start: int = 0,
    left_out: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Batches:
    """Returns the batches of steps start, start + 1, ... for ever.

    Args:
      config: how tokens become rows and rows become batches.
      splits: from `open_splits(config, "train")`.
      seed: of the order of the rows; from 0 to 2**32 - 1.
      sharding: of "BT"; None places batches on the default device.
      start: steps done before.
      left_out: numbers of batches that no step is given, ascending; the others follow
        one another.
      vocab_size: refuse batches with a token that is not below it.
    """
    packed = [_pack(config, split, keep_tail=False) for split in splits]
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
    splits: Sequence[TokenSplit],
    *,
    sharding: jax.sharding.NamedSharding | None,
    num_batches: int,
    vocab_size: int | None = None,
) -> Batches:
    """Returns the same batches at every call, with each row of the splits at most once.

    Splits follow one another, whatever `config.data.weights` says. The last batch is
    filled up with rows of padding, so that a mean over all targets is exact.

    Args:
      config: how tokens become rows and rows become batches.
      splits: from `open_splits(config, "eval")`.
      sharding: of "BT"; None places batches on the default device.
      num_batches: at most so many, with rows evenly spread over all; 0 is every row.
      vocab_size: refuse batches with a token that is not below it.
    """
    packed = [_pack(config, split, keep_tail=True) for split in splits]
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


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batch by step: what Grain reads from."""

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


def _pack(config: DataConfig, split: TokenSplit, *, keep_tail: bool) -> PackedSplit:
    return pack(split, config.sequence_length, config.packing, keep_tail=keep_tail)
