# SPDX-License-Identifier: Apache-2.0
"""Tokens as rows that are sorted by expert, and back. All arrays are a device's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which row belongs to which pair of a token and one of its experts.

    Everything is read by index, forward and backward: a scatter that adds would do so
    in another order each time on a GPU.
    """

    pair_of_row: jax.Array  # int32 [rows]; the number of pairs where a row is empty
    row_of_pair: jax.Array  # int32 [tokens, experts of each]; rows if it has none
    sizes: jax.Array  # int32 [groups]: pairs of each, that have a row or not

    def take(self, x: jax.Array) -> jax.Array:
        """Returns each row's token, of x [tokens, ...]; zeros where it is empty."""
        token_of_row = self.pair_of_row // self.row_of_pair.shape[1]
        return x.at[token_of_row].get(mode="fill", fill_value=0)

    def take_each(self, values: jax.Array) -> jax.Array:
        """Returns each row's pair, of values [tokens, experts of each]."""
        return values.reshape(-1).at[self.pair_of_row].get(mode="fill", fill_value=0)

    def add_up(self, out: jax.Array) -> jax.Array:
        """Returns the sum of each token's rows, of out [rows, width]; in float32."""
        wide = np.promote_types(out.dtype, np.float32)
        total = jnp.zeros((self.row_of_pair.shape[0], out.shape[1]), wide)
        for rows in self.row_of_pair.T:
            total += out.at[rows].get(mode="fill", fill_value=0).astype(wide)
        return total.astype(out.dtype)

    def give_each(self, values: jax.Array) -> jax.Array:
        """Returns each pair's row, of values [rows]; zeros for pairs that have none."""
        return values.at[self.row_of_pair].get(mode="fill", fill_value=0)


def sort_rows(
    groups: jax.Array, num_groups: int, num_rows: int, capacity: int | None = None
) -> Rows:
    """Gives pairs a row: those of group 0 first, each in the order of the tokens.

    Args:
      groups: int32 [tokens, experts of each]; num_groups or more has no row.
      num_groups: how many groups there are.
      num_rows: at least the pairs that have a group; capacity * num_groups if that is
        given.
      capacity: rows of each group, some empty; pairs beyond them get none. None: a
        group has as many rows as pairs, and empty rows are the last ones.
    """
    flat = jnp.minimum(groups.reshape(-1), num_groups)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    in_order = flat[order]
    counts = jnp.bincount(flat, length=num_groups + 1).astype(jnp.int32)
    place = jnp.arange(flat.size, dtype=jnp.int32)
    has_row = in_order < num_groups
    if capacity is not None:
        rank = place - (jnp.cumsum(counts) - counts)[in_order]
        has_row &= rank < capacity
        place = in_order * capacity + rank
    place = jnp.where(has_row, place, num_rows)
    empty = jnp.full(num_rows, flat.size, jnp.int32)
    return Rows(
        pair_of_row=empty.at[place].set(order, mode="drop"),
        row_of_pair=jnp.zeros_like(flat).at[order].set(place).reshape(groups.shape),
        sizes=counts[:num_groups],
    )
