# SPDX-License-Identifier: Apache-2.0
"""The tokens of a run, opened and checked once, and the batches that it makes."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from jaxllm.cluster.agreement import is_lead
from jaxllm.data.batches import (
    Batches,
    check_memory,
    eval_batches,
    load_batches,
)
from jaxllm.data.fingerprint import data_fingerprint, eval_fingerprint
from jaxllm.data.formats import TokenSplit
from jaxllm.data.packing import PackedSplit, pack_all
from jaxllm.data.splits import (
    check_batch,
    check_vocab,
    describe_documents,
    open_held_out,
    open_train,
)
from jaxllm.step import Setup

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunData:
    """The tokens that a run trains on and is evaluated on, packed into rows."""

    setup: Setup
    train: Sequence[PackedSplit]
    held_out: Sequence[PackedSplit]  # () without evaluations

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch, saved in each checkpoint."""
        return data_fingerprint(self.setup.config.data, _splits(self.train))

    @property
    def eval_fingerprint(self) -> str | None:
        """What decides an evaluation; None without any."""
        if not self.held_out:
            return None
        config = self.setup.config
        splits = _splits(self.held_out)
        return eval_fingerprint(config.data, splits, config.eval.batches)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the tokens from others, by name, wherever the files are."""
        return {
            "the training tokens": self.fingerprint["config.data.paths"],
            "the held-out tokens": self.eval_fingerprint,
        }

    def batches(self, start: int = 0, left_out: Sequence[int] = ()) -> Batches:
        """Returns the batches of steps start, start + 1, ... without end.

        Args:
          start: the first step.
          left_out: numbers of batches that no step is given, ascending.
        """
        config = self.setup.config
        return load_batches(
            config.data,
            self.train,
            seed=config.seed,
            sharding=self.setup.abstract_batch["tokens"].sharding,
            start=start,
            left_out=left_out,
            vocab_size=config.model.vocab_size,
        )

    def eval_batches(self) -> Batches:
        """Returns the batches of an evaluation, the same ones at every call."""
        assert self.held_out, "opened by `open_run_data`"
        config = self.setup.config
        return eval_batches(
            config.data,
            self.held_out,
            sharding=self.setup.abstract_batch["tokens"].sharding,
            num_batches=config.eval.batches,
            vocab_size=config.model.vocab_size,
        )


def open_train_data(setup: Setup) -> RunData:
    """Opens the training tokens of a config.

    Raises:
      InputError: they cannot be read, or do not fit the config.
    """
    return RunData(setup, _pack_train(setup, _open_train(setup)), ())


def open_run_data(setup: Setup) -> RunData:
    """Opens the training tokens of a config, and the held-out ones.

    Raises:
      InputError: as `open_train_data`; or there are no held-out tokens, or the training
        data has them too.
    """
    config = setup.config
    train = _open_train(setup)
    held_out = open_held_out(config.data, train)
    check_vocab(held_out, config.model.vocab_size)
    packed = pack_all(config.data, held_out, keep_tail=True)
    return RunData(setup, _pack_train(setup, train), packed)


def _open_train(setup: Setup) -> Sequence[TokenSplit]:
    config = setup.config
    check_memory(config.data, setup.abstract_batch["tokens"].sharding)
    splits = open_train(config.data)
    check_vocab(splits, config.model.vocab_size)
    for split in splits:
        if (words := describe_documents(split)) and is_lead():
            _log.info("%s", words)
    return splits


def _pack_train(setup: Setup, splits: Sequence[TokenSplit]) -> list[PackedSplit]:
    config = setup.config.data
    packed = pack_all(config, splits, keep_tail=False)
    check_batch(config, sum(map(len, packed)))
    return packed


def _splits(packed: Sequence[PackedSplit]) -> list[TokenSplit]:
    return [rows.split for rows in packed]
