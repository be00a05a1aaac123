# SPDX-License-Identifier: Apache-2.0
"""The tokens of a run, opened and checked, and the batches that it makes of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxllm.data.batches import Batches, eval_batches, load_batches
from jaxllm.data.formats import TokenSplit
from jaxllm.data.splits import check_vocab, data_fingerprint, open_splits
from jaxllm.step import Setup


@dataclasses.dataclass(frozen=True)
class TrainData:
    """The tokens that a run trains on."""

    setup: Setup
    splits: Sequence[TokenSplit]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch, saved in each checkpoint."""
        return data_fingerprint(self.setup.config.data, self.splits)

    def batches(self, start: int = 0, left_out: Sequence[int] = ()) -> Batches:
        """Returns the batches of steps start, start + 1, ... without end.

        Args:
          start: the first step.
          left_out: numbers of batches that no step is given, ascending.
        """
        config = self.setup.config
        return load_batches(
            config.data,
            self.splits,
            seed=config.seed,
            sharding=self.setup.abstract_batch["tokens"].sharding,
            start=start,
            left_out=left_out,
            vocab_size=config.model.vocab_size,
        )


def open_train_data(setup: Setup) -> TrainData:
    """Opens the training tokens of a config.

    Raises:
      InputError: they cannot be read, or do not fit the config.
    """
    splits = open_splits(setup.config.data, "train")
    check_vocab(splits, setup.config.model.vocab_size)
    return TrainData(setup, splits)


def open_eval_batches(setup: Setup) -> Batches:
    """Returns the batches of an evaluation, the same ones at every call.

    Raises:
      InputError: there are no held-out tokens, or the training data has them too.
    """
    config = setup.config
    splits = open_splits(config.data, "eval")
    check_vocab(splits, config.model.vocab_size)
    return eval_batches(
        config.data,
        splits,
        sharding=setup.abstract_batch["tokens"].sharding,
        num_batches=config.eval.batches,
        vocab_size=config.model.vocab_size,
    )
