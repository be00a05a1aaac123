# SPDX-License-Identifier: Apache-2.0
"""The kernels between the matmuls: logits to exponentials, these to the gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.cross_entropy.tiles import EXPONENTIALS, GRADIENT, WARPGROUP, Tile

LOG2_E = 1.4426950408889634

# A row with a logit so far above its reference is recomputed: exponentials and their
# sums stay far from overflow.
MARGIN = 20.0


def exponentials(
    logits_TV: jax.Array,
    out: Any,
    start: jax.Array,
    *,
    softcap: float | None,
    tile: Tile,
) -> tuple[jax.Array, jax.Array]:
    """Returns for each row of logits a reference and the sum of exp(logit - reference).

    The reference is the largest logit of the row's first step or, where that is more
    than `MARGIN` below another one, of all the row. It is known before the row is read,
    so that each logit is read once and its exponential stored at once. All exponentials
    of a row have the same reference.

    Args:
      logits_TV: float32; V is a multiple of 8 and at least `tile.words`.
      out: ref of at least start + T rows, or None. Its rows from start on become the
        exponentials, each times the slope of the soft-cap.
      start: int32 [1].
      softcap: c * tanh(logits / c) takes the place of the logits; None is off.
      tile: of `find_tile`.

    Source: to keep a reference that is near the maximum is an idea of FlashAttention-4.
    """

    def body(logits_gmem, start_gmem, *refs):
        *out_gmem, reference_gmem, total_gmem = refs
        row = lax.axis_index("row")
        outs = [ref.at[start_gmem[0] + row] for ref in out_gmem]

        def finish(reference, total):
            reference_gmem[row] = reference
            total_gmem[row] = total

        _read_row(logits_gmem.at[row], outs, finish, softcap, tile)

    rows = logits_TV.shape[0]
    per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    run = mosaic.kernel(
        body,
        name=EXPONENTIALS,
        barriers=False,  # no thread reads what is stored
        out_type=(per_row, per_row),
        grid=(rows,),
        grid_names=("row",),
    )
    return run(logits_TV, start, *([] if out is None else [out]))


def make_gradient(
    e: Any,
    weight_T: jax.Array,
    words_T: jax.Array,
    values_T: jax.Array,
    *,
    tile: Tile,
) -> None:
    """Multiplies each row of a ref by its weight, and puts its value at its word.

    Args:
      e: ref [T, V], changed in place; V is a multiple of 8 and at least `tile.words`.
      weight_T: float32.
      words_T: int32; where it is not in [0, V) the row gets no value.
      values_T: float32.
      tile: of `find_tile`.
    """
    rows, num_words = e.shape
    part = WARPGROUP * tile.vector
    layout = plgpu.Layout.WG_STRIDED((part,), vec_size=tile.vector)
    steps, rest = divmod(num_words, tile.words)
    last = num_words - tile.words

    def body(weight_gmem, words_gmem, values_gmem, e_gmem):
        row = lax.axis_index("row")
        weight, word, value = weight_gmem[row], words_gmem[row], values_gmem[row]

        def load(first):
            places = [pl.ds(first + i * part, part) for i in range(tile.loads)]
            refs = [e_gmem.at[row, place] for place in places]
            return [plgpu.load(ref, layout=layout, optimized=False) for ref in refs]

        def use(first, parts):
            for i, part_e in enumerate(parts):
                begin = first + i * part
                words = plgpu.broadcasted_iota(jnp.int32, (part,), 0, layout=layout)
                scaled = part_e.astype(jnp.float32) * weight
                out = jnp.where(words + begin == word, value, scaled)
                e_gmem[row, pl.ds(begin, part)] = out.astype(e_gmem.dtype)

        # The last step overlaps the one before, and must see what that overwrites: a
        # store waits for all threads to have done their loads before it.
        tail = load(last) if rest else []

        @pl.loop(0, steps)
        def _(step):
            use(step * tile.words, load(step * tile.words))

        use(last, tail)

    run = mosaic.kernel(body, name=GRADIENT, grid=(rows,), grid_names=("row",))
    run(weight_T, words_T, values_T, e)


def _read_row(logits_gmem, outs, finish, softcap, tile):
    part = WARPGROUP * tile.vector
    layout = plgpu.Layout.WG_STRIDED((part,), vec_size=tile.vector)
    (num_words,) = logits_gmem.shape
    steps, rest = divmod(num_words, tile.words)
    last = num_words - tile.words  # the last step may read again what is before it

    def load(step):
        first = jnp.minimum(step * tile.words, last)
        places = [pl.ds(first + i * part, part) for i in range(tile.loads)]
        refs = [logits_gmem.at[place] for place in places]
        return [plgpu.load(ref, layout=layout, optimized=False) for ref in refs]

    def use(first, raw, reference, total, top, seen=None):
        for i, logits in enumerate(raw):
            logits, slope = _capped(logits, softcap)
            top = jnp.maximum(top, logits)
            e = jnp.exp2((logits - reference) * LOG2_E)
            begin = first + i * part
            for out in outs:
                scaled = e if slope is None else e * slope
                out[pl.ds(begin, part)] = scaled.astype(out.dtype)
            if seen is not None:
                words = plgpu.broadcasted_iota(jnp.int32, (part,), 0, layout=layout)
                e = jnp.where(words + begin >= seen, e, 0.0)
            total += e
        return total, top

    def read_with(reference):
        def step(i, carry):
            raw, total, top = carry
            ahead = load(i + 1)  # on its way while this step is computed
            return ahead, *use(i * tile.words, raw, reference, total, top)

        zero = plgpu.layout_cast(jnp.zeros((part,), jnp.float32), layout)
        raw, total, top = lax.fori_loop(0, steps, step, (head, zero, zero + reference))
        if rest:
            seen = steps * tile.words
            total, top = use(last, raw, reference, total, top, seen)
        finish(reference, jnp.sum(total))
        return jnp.max(top)

    head = load(0)
    near = jnp.max(_capped(functools.reduce(jnp.maximum, head), softcap)[0])
    top = read_with(near)

    @pl.when(top > near + MARGIN)
    def _():
        read_with(top)


def _capped(x: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns the soft-capped logits and the slope of that; None is 1.

    The GPU's own tanh keeps 11 bits only, exp2 and rsqrt keep 22; and a quotient takes
    ten instructions, the square of rsqrt two.
    """
    if softcap is None:
        return x, None
    root = lax.rsqrt(jnp.exp2(x * (2 * LOG2_E / softcap)) + 1.0)
    squashed = 1.0 - 2.0 * (root * root)
    return softcap * squashed, 1.0 - squashed * squashed
