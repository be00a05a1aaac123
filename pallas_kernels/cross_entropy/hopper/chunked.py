# SPDX-License-Identifier: Apache-2.0
"""Output projection and cross-entropy around the kernel, a chunk of tokens at a time.

The matmuls are XLA's. Between them, the kernel reads each float32 logit once and writes
its exponential in bfloat16. A factor of the row turns that into the gradient, in place:
it is known after the row (and, where the vocabulary is sharded, after the other
devices). That is 10 bytes a logit in all. Factors on x and dx instead would save 4,
but round x once more: where nearly all of dw comes from the targets, as at the start of
a training, that error is many times that of the reference.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.hopper.kernels import exponentials, make_gradient
from pallas_kernels.cross_entropy.reference import Terms, matmul, sum_over
from pallas_kernels.cross_entropy.tiles import (
    EXPONENTIALS,
    GRADIENT,
    find_tile,
    rows_of_logits,
)
from pallas_kernels.target import current_target


def chunked_cross_entropy(
    x_TD: jax.Array,
    w: jax.Array,
    targets_T: jax.Array,
    *,
    letters: str,
    z_loss: float,
    softcap: float | None,
    chunk_tokens: int,
    vocab_axes: tuple[str, ...],
    with_gradients: bool,
) -> Terms:
    """Returns what the reference returns, from bfloat16 x and w.

    Exponentials of `chunk_tokens` tokens exist at one time, in bfloat16, and float32
    logits of a part of these tokens.
    """
    num_tokens = len(x_TD)
    num_words = w.shape[letters.index("V")]
    chunks, parts, rows = _cut(num_tokens, chunk_tokens, num_words)
    chunk = parts * rows
    padding = chunks * chunk - num_tokens
    all_x_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
    all_targets_T = jnp.pad(targets_T, (0, padding), constant_values=-1)
    buffer, dx_TD = None, None
    if with_gradients:
        # One for all chunks, written in place: what a scan returns would be copied.
        buffer = jax.new_ref(jax.lax.empty((chunk, num_words), x_TD.dtype))
        dx_TD = jnp.zeros_like(all_x_TD)

    def add_chunk(sums, start):
        x_TD = jax.lax.dynamic_slice_in_dim(all_x_TD, start, chunk)
        targets_T = jax.lax.dynamic_slice_in_dim(all_targets_T, start, chunk)
        nll, objective, dlogits_TV = _chunk_terms(
            x_TD, w, targets_T, buffer, letters, z_loss, softcap, vocab_axes, parts
        )
        all_dx_TD, dw = sums.dx_TD, None
        if buffer is not None and dlogits_TV is not None:
            dx_TD = matmul(f"TV,{letters}->TD", dlogits_TV, w)
            dx_TD = sum_over(dx_TD, vocab_axes).astype(x_TD.dtype)
            dw = matmul(f"TD,TV->{letters}", x_TD, dlogits_TV)
            dw = dw if sums.dw is None else sums.dw + dw
            # The next chunk writes where these matmuls read: after them, not to a copy.
            done = jax.lax.optimization_barrier((dx_TD, dw, dlogits_TV))
            dx_TD, dw, buffer[...] = done
            all_dx_TD = jax.lax.dynamic_update_slice(
                all_dx_TD, dx_TD, (start, jnp.int32(0))
            )
        return Terms(sums.nll + nll, sums.objective + objective, all_dx_TD, dw), None

    zero = jnp.zeros((), jnp.float32)
    starts = jnp.arange(0, chunks * chunk, chunk, dtype=jnp.int32)
    # The first chunk makes dw, so that no zeros are written and read.
    sums, _ = add_chunk(Terms(zero, zero, dx_TD, None), starts[0])
    if chunks > 1:
        sums, _ = jax.lax.scan(add_chunk, sums, starts[1:])
    dx_TD = None if sums.dx_TD is None else sums.dx_TD[:num_tokens]
    return sums._replace(dx_TD=dx_TD)


def _cut(num_tokens: int, chunk_tokens: int, num_words: int) -> tuple[int, int, int]:
    """Returns the numbers of chunks, of parts of a chunk, and of tokens of a part."""
    chunks = -(-num_tokens // chunk_tokens)
    chunk = -(-num_tokens // chunks)
    rows = rows_of_logits(num_words, chunk)
    return chunks, -(-chunk // rows), rows


def _chunk_terms(
    x_TD, w, targets_T, buffer, letters, z_loss, softcap, vocab_axes, parts
):
    num_words = w.shape[letters.index("V")]
    first = jax.lax.axis_index(vocab_axes) * num_words if vocab_axes else 0
    # Negative, or too large, where there is no target or another device has it.
    words_T = jnp.where(targets_T < 0, -1, targets_T - first)
    stats = _read_logits(x_TD, w, words_T, buffer, letters, softcap, parts)
    reference_T, total_T, target_T = stats
    lse_T, target_T = _over_vocab(reference_T, total_T, target_T, vocab_axes)
    counts_T = targets_T >= 0
    nll = jnp.where(counts_T, lse_T - target_T, 0.0).sum()
    objective = nll + z_loss * jnp.where(counts_T, lse_T**2, 0.0).sum()
    if buffer is None:
        return nll, objective, None
    factor_T = 1 + 2 * z_loss * lse_T
    weight_T = jnp.where(counts_T, jnp.exp(reference_T - lse_T) * factor_T, 0.0)
    dtarget_T = jnp.exp(target_T - lse_T) * factor_T - 1
    if softcap is not None:
        dtarget_T *= 1 - (target_T / softcap) ** 2
    tile = find_tile(current_target(), GRADIENT, num_words)
    make_gradient(buffer, weight_T, words_T, dtarget_T, tile=tile)
    return nll, objective, buffer[...]


def _read_logits(x_TD, w, words_T, buffer, letters, softcap, parts):
    """Returns each row's reference, sum of exponentials, and logit of its word or 0."""
    num_words = w.shape[letters.index("V")]
    tile = find_tile(current_target(), EXPONENTIALS, num_words)
    rows = len(x_TD) // parts

    def read_part(_, inputs):
        start, x_TD, words_T = inputs
        logits_TV = matmul(f"TD,{letters}->TV", x_TD, w)
        stats = exponentials(logits_TV, buffer, start, softcap=softcap, tile=tile)
        # Keeps the call out of a fusion with the writing of the scan's outputs: the
        # call itself says that it writes `buffer` in place.
        reference_T, total_T = jax.lax.optimization_barrier(stats)
        here_T = (words_T >= 0) & (words_T < num_words)
        word_T1 = jnp.where(here_T, words_T, 0)[:, None]
        target_T = jnp.take_along_axis(logits_TV, word_T1, axis=-1)[:, 0]
        if softcap is not None:
            target_T = softcap * jnp.tanh(target_T / softcap)
        return None, (reference_T, total_T, jnp.where(here_T, target_T, 0.0))

    starts = jnp.arange(0, parts * rows, rows, dtype=jnp.int32)[:, None]
    inputs = (starts, x_TD.reshape(parts, rows, -1), words_T.reshape(parts, rows))
    _, found = jax.lax.scan(read_part, None, inputs)
    return (each.reshape(-1) for each in found)


def _over_vocab(reference_T, total_T, target_T, vocab_axes):
    """Returns logsumexp and the target's logit over all parts of the vocabulary."""
    lse_T = reference_T + jnp.log(total_T)
    if not vocab_axes:
        return lse_T, target_T
    top_T = jax.lax.pmax(lse_T, vocab_axes)
    total_T, target_T = sum_over(
        jnp.stack([jnp.exp(lse_T - top_T), target_T]), vocab_axes
    )
    return top_T + jnp.log(total_T), target_T
