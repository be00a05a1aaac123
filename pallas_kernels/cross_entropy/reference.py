# SPDX-License-Identifier: Apache-2.0
"""Output projection and cross-entropy in plain JAX, a chunk of tokens at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Terms(NamedTuple):
    """Sums over the tokens that have a target, and the gradients of `objective`."""

    nll: jax.Array  # float32 []: negative log-likelihood
    objective: jax.Array  # float32 []: nll + z_loss * logsumexp**2
    dx_TD: jax.Array | None  # dtype of x
    dw: jax.Array | None  # float32, shape of w


def reference_cross_entropy(
    x_TD: jax.Array,
    w: jax.Array,
    targets_T: jax.Array,
    *,
    letters: str,
    z_loss: float,
    softcap: float | None,
    chunk_tokens: int,
    vocab_axes: tuple[str, ...] = (),
    with_gradients: bool,
) -> Terms:
    """Returns the summed loss of softmax(softcap(x w)) and, if asked, its gradients.

    The gradients are made in the same pass as the loss, while a chunk's logits exist:
    no logits are kept, and none are made twice.

    Args:
      x_TD: bfloat16 or float32, the tokens of this device.
      w: dtype of x, "DV" or "VD": this device's part of the vocabulary.
      targets_T: int32; -1 is no target.
      letters: of w.
      z_loss: weight of the squared logsumexp (Chowdhery et al., arXiv:2204.02311).
      softcap: c * tanh(logits / c); None is off.
      chunk_tokens: tokens whose float32 logits exist at one time.
      vocab_axes: mesh axes that shard V; with any, this runs inside `shard_map`.

    Source: the gradient in the forward pass follows Hsu et al., "Liger Kernel"
    (arXiv:2410.10989).
    """
    num_tokens, d = x_TD.shape
    chunk = min(chunk_tokens, num_tokens)
    padding = -num_tokens % chunk
    x_CTD = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(-1, chunk, d)
    targets_CT = jnp.pad(targets_T, (0, padding), constant_values=-1).reshape(-1, chunk)

    def add_chunk(sums, inputs):
        x_TD, targets_T = inputs
        nll, objective, dlogits_TV = _chunk_terms(
            x_TD, w, targets_T, letters, z_loss, softcap, vocab_axes
        )
        dx_TD = None
        dw = sums.dw
        if with_gradients:
            dlogits_TV = dlogits_TV.astype(x_TD.dtype)
            dx_TD = matmul(f"TV,{letters}->TD", dlogits_TV, w)
            dx_TD = sum_over(dx_TD, vocab_axes).astype(x_TD.dtype)
            dw = dw + matmul(f"TD,TV->{letters}", x_TD, dlogits_TV)
        return Terms(sums.nll + nll, sums.objective + objective, None, dw), dx_TD

    zero = jnp.zeros((), jnp.float32)
    dw = jnp.zeros(w.shape, jnp.float32) if with_gradients else None
    sums, dx_CTD = jax.lax.scan(
        add_chunk, Terms(zero, zero, None, dw), (x_CTD, targets_CT)
    )
    if dx_CTD is not None:
        sums = sums._replace(dx_TD=dx_CTD.reshape(-1, d)[:num_tokens])
    return sums


def _chunk_terms(x_TD, w, targets_T, letters, z_loss, softcap, vocab_axes):
    logits_TV = matmul(f"TD,{letters}->TV", x_TD, w)
    slope_TV = 1.0
    if softcap is not None:
        squashed_TV = jnp.tanh(logits_TV / softcap)
        logits_TV, slope_TV = softcap * squashed_TV, 1 - squashed_TV**2
    top_T1 = logits_TV.max(-1, keepdims=True)
    top_T1 = jax.lax.pmax(top_T1, vocab_axes) if vocab_axes else top_T1
    total_T1 = sum_over(jnp.exp(logits_TV - top_T1).sum(-1, keepdims=True), vocab_axes)
    lse_T1 = top_T1 + jnp.log(total_T1)

    num_words = logits_TV.shape[-1]
    first = jax.lax.axis_index(vocab_axes) * num_words if vocab_axes else 0
    words_1V = first + jnp.arange(num_words, dtype=jnp.int32)[None]
    hit_TV = words_1V == targets_T[:, None]
    target_T1 = sum_over(
        jnp.where(hit_TV, logits_TV, 0.0).sum(-1, keepdims=True), vocab_axes
    )
    counts_T1 = (targets_T >= 0)[:, None]
    nll = jnp.where(counts_T1, lse_T1 - target_T1, 0.0).sum()
    penalty = z_loss * jnp.where(counts_T1, lse_T1**2, 0.0).sum()
    softmax_TV = jnp.exp(logits_TV - lse_T1)
    dlogits_TV = softmax_TV * (1 + 2 * z_loss * lse_T1) - hit_TV.astype(jnp.float32)
    return nll, nll + penalty, jnp.where(counts_T1, dlogits_TV * slope_TV, 0.0)


def matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the einsum of a and b in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the sum over mesh axes, or x if there are none."""
    return jax.lax.psum(x, axes) if axes else x
