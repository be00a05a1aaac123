# SPDX-License-Identifier: Apache-2.0
"""Mixes several paths: the n-th row, for any n, without end.

The order is a pure function of the numbers of rows, the weights and the seed: any
process can ask for any n, and all get the same answer.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

from jaxllm.errors import InputError

MAX_ROWS = 2**32  # Grain shuffles 32-bit numbers


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An endless stream of rows of several paths, in exact proportions."""

    proportions: tuple[int, ...]  # rows from each path, out of every sum(proportions)
    orders: tuple[grain.MapDataset[int], ...]  # of the rows of each path, endless

    def row(self, n: int) -> tuple[int, int]:
        """Returns the n-th row: the number of its path, and its number there."""
        path, nth = draw(n, self.proportions)
        row = self.orders[path][nth]
        assert row is not None  # only a filter leaves elements out
        return path, row


def mix_rows(
    num_rows: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool
) -> Mixture:
    """Returns the order of the rows of several paths.

    Each path is read completely before a row repeats. With shuffle, each path has its
    own order in each epoch; without, the order of the file.

    Args:
      num_rows: of each path.
      weights: share of each path; () is by number of rows, so that an epoch of the
        mixture has every row once.
      seed: of the shuffles; from 0 to 2**32 - 1.
      shuffle: False reads each path in order.
    """
    if max(num_rows) > MAX_ROWS:
        raise InputError(
            f"config.data.paths has a path with {max(num_rows)} rows, and shuffling "
            f"handles {MAX_ROWS} a path; split it into several paths, or raise "
            "config.data.sequence_length."
        )
    orders = []
    for path, rows in enumerate(num_rows):
        order = grain.MapDataset.range(rows)
        if shuffle:
            # Not neighbouring seeds: findings/grain_neighbour_seeds.sh.
            order = order.shuffle(seed=_derive_seed(seed, path))
        orders.append(order.repeat(None, reseed_each_epoch=shuffle))
    return Mixture(_proportions(weights or num_rows), tuple(orders))


def draw(n: int, proportions: Sequence[int]) -> tuple[int, int]:
    """Returns the path of the n-th row, and how many of that path came before it.

    Of every sum(proportions) rows, path i has exactly proportions[i], evenly spread.
    The rule is that of grain.MapDataset.mix, without its rounding of weights:
    findings/grain_mix_weights.sh.
    """
    before, after, remaining = n, n + 1, sum(proportions)
    for path, share in enumerate(proportions):
        others_before = before * (remaining - share) // remaining
        others_after = after * (remaining - share) // remaining
        if others_before == others_after:
            return path, before - others_before
        before, after, remaining = others_before, others_after, remaining - share
    raise AssertionError("the shares of the paths add up to all rows")


def _proportions(weights: Sequence[float]) -> tuple[int, ...]:
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10, as written
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(weight // math.gcd(*whole) for weight in whole)


def _derive_seed(seed: int, path: int) -> int:
    return int(np.random.SeedSequence([seed, path]).generate_state(1)[0])
