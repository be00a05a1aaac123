# SPDX-License-Identifier: Apache-2.0
"""The backward kernel: every row is read once and written once.

It computes the statistics of a row again instead of reading them: the row is there, so
that costs no memory traffic, and nothing but the input of the norm is ever saved.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.norm.hopper import rows
from pallas_kernels.norm.hopper.sweep import sweep
from pallas_kernels.norm.tiles import Tile


def backward(
    x_RD: jax.Array,
    dy_RD: jax.Array,
    dsum_RD: jax.Array | None,
    weight_D: jax.Array,
    *,
    eps: float,
    is_centered: bool,
    tile: Tile,
) -> list[jax.Array]:
    """Returns the gradients of x (plus dsum), of the weight and, of LayerNorm, bias.

    Every block adds up the latter two over its rows, and plain JAX over the blocks, in
    the same order every time.

    Args:
      x_RD: what was normalised: the sum, if there was a residual.
      dy_RD: gradient of the norm's output.
      dsum_RD: gradient that the sum has from elsewhere, or None.
      weight_D: float32.
      is_centered: whether this is LayerNorm, else RMSNorm.
    """
    num_rows, width = x_RD.shape
    inputs = [x for x in (x_RD, dy_RD, dsum_RD) if x is not None]
    pieces = range(tile.num_pieces)
    room = 0.4 * tile.registers / tile.columns  # pieces that a thread can keep
    # Where a thread has no room for both totals, plain JAX reads dy again.
    num_totals = 1 + (is_centered and room > 2)

    def prepare(vector_refs):
        (ref,) = vector_refs
        weight = functools.partial(rows.load_vector, tile, ref)
        weight = rows.remember(tile, weight, room >= num_totals + 1)

        def step(sources, targets, first_row, carry, exchange):
            loads = [functools.partial(rows.load, tile, ref) for ref in sources]
            x, dy = (
                rows.remember(tile, load, tile.columns <= 16) for load in loads[:2]
            )
            center, mean_slope, rstd, slope = _row_numbers(
                tile, width, eps, is_centered, x, dy, weight, exchange
            )
            added = [[] for _ in carry]
            for k in pieces:
                gradient, normed = dy(k), center(k) * rstd
                dx = gradient * weight(k) - normed * slope
                if mean_slope is not None:
                    dx = dx - mean_slope
                dx = dx * rstd
                dx = sum((more(k) for more in loads[2:]), dx)
                rows.store(tile, targets[0], k, dx.astype(x_RD.dtype))
                terms = (gradient * normed, gradient)
                for new, old, term in zip(added, carry, terms, strict=False):
                    term = rows.keep_rows(tile, term, first_row, num_rows)
                    new.append(old[k] + term)
            return added

        start = [[rows.zeros(tile) for _ in pieces] for _ in range(num_totals)]
        return step, start

    dx, *totals = sweep(
        "norm_backward",
        tile,
        inputs,
        [rows.arrange(tile, weight_D)],
        num_outputs=1,
        num_totals=num_totals,
        prepare=prepare,
    )
    over = (0, 1) if tile.is_narrow else 0
    sums = [rows.rearrange(tile, total.sum(over), width) for total in totals]
    if is_centered and num_totals == 1:
        sums.append(dy_RD.astype(jnp.float32).sum(0))
    return [dx, *sums]


def _row_numbers(tile, width, eps, is_centered, x, dy, weight, exchange):
    """Returns what the gradient of a row needs of the whole row.

    With n = (x - mean) * rstd and g = dy * weight: x - mean, mean(g) (LayerNorm),
    rstd and mean(g * n).
    """

    def slope(k):
        return dy(k) * weight(k)

    center, mean_slope = x, None
    if is_centered:
        total, total_slope = rows.row_sums(tile, width, exchange, x, slope)
        mean = rows.spread(tile, total / width)
        mean_slope = rows.spread(tile, total_slope / width)

        def center(k):
            return x(k) - mean

    squares, along = rows.row_sums(
        tile,
        width,
        exchange,
        lambda k: center(k) * center(k),
        lambda k: slope(k) * center(k),
    )
    rstd = lax.rsqrt(squares / width + eps)
    along = along * rstd / width
    return center, mean_slope, rows.spread(tile, rstd), rows.spread(tile, along)
