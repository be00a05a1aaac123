# SPDX-License-Identifier: Apache-2.0
"""The forward kernel: every row is read once and written once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.norm.hopper import rows
from pallas_kernels.norm.hopper.sweep import sweep
from pallas_kernels.norm.tiles import Tile


def forward(
    x_RD: jax.Array,
    residual_RD: jax.Array | None,
    weight_D: jax.Array,
    bias_D: jax.Array | None,
    *,
    eps: float,
    tile: Tile,
) -> list[jax.Array]:
    """Returns [the sum of x and residual, if there is one,] and its norm.

    Args:
      weight_D: float32.
      bias_D: float32, of a LayerNorm; None is an RMSNorm.
    """
    width = x_RD.shape[1]
    inputs = [x for x in (x_RD, residual_RD) if x is not None]
    vectors = [v for v in (weight_D, bias_D) if v is not None]
    dtype = x_RD.dtype

    room = tile.registers // 2 // tile.columns  # pieces that a thread can keep

    def prepare(vector_refs):
        loads = [functools.partial(rows.load_vector, tile, ref) for ref in vector_refs]
        weight, *bias = (
            rows.remember(tile, load, len(vectors) <= room) for load in loads
        )

        def step(sources, targets, first_row, carry, exchange):
            del first_row

            def read(k):
                x, *others = (rows.load(tile, source, k) for source in sources)
                # Rounded as the sum that the caller gets is.
                return sum(others, x).astype(dtype).astype(jnp.float32)

            is_kept = len(vectors) < room
            x = rows.remember(tile, read, is_kept)
            *sums, normed = targets

            def write_sum(k, value):
                for target in sums:
                    rows.store(tile, target, k, value.astype(dtype))

            # Memory has this to do while the statistics are on their way.
            is_early = is_kept and not tile.staged
            for k in range(tile.num_pieces * is_early):
                write_sum(k, x(k))
            center, rstd = statistics(tile, width, eps, bias_D is not None, x, exchange)
            for k in range(tile.num_pieces):
                # Both before either is written: what is not kept is read again.
                value, y = x(k), center(k) * rstd * weight(k)
                y = sum((more(k) for more in bias), y)
                rows.store(tile, normed, k, y.astype(dtype))
                if not is_early:
                    write_sum(k, value)
            return carry

        return step, ()

    return sweep(
        "norm_forward",
        tile,
        inputs,
        [rows.arrange(tile, vector) for vector in vectors],
        num_outputs=len(inputs),
        num_totals=0,
        prepare=prepare,
    )


def statistics(tile, width, eps, is_centered, x, exchange):
    """Returns pieces of x less its mean, if that is asked, and 1 / their rms."""
    center = x
    if is_centered:
        (total,) = rows.row_sums(tile, width, exchange, x)
        mean = rows.spread(tile, total / width)

        def center(k):
            return x(k) - mean

    (squares,) = rows.row_sums(tile, width, exchange, lambda k: center(k) * center(k))
    return center, rows.spread(tile, lax.rsqrt(squares / width + eps))
