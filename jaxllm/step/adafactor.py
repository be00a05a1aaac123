# SPDX-License-Identifier: Apache-2.0
"""Adafactor's scaling of a gradient: each layer's weight is a matrix of its own.

Not Optax's, which takes every array for one matrix: of a stack of layers it factors the
two longest dims, be one of them the layers, and clips all layers by one RMS.

A weight maps from or to the model width D, however many dims its other side has: of
"DNH", D + N * H second moments are kept. Of biases and the scales of norms all are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.step.muon import BATCH_LETTERS, is_matrix

DECAY_EXPONENT = 0.8  # update t keeps 1 - t**-0.8 of the second moments
UPDATE_RMS = 1.0  # of one layer's update, at most


class AdafactorState(NamedTuple):
    """Second moments, in trees like the parameters: dims that are averaged have size 1,
    so that the others lie on the mesh as the parameter's do."""

    num_updates: jax.Array  # int32 []: made
    rows: Any  # averaged over all but D; over all if the parameter is no matrix
    columns: Any  # averaged over D; each element's if the parameter is no matrix


def scale_by_adafactor(letters: Any, eps: float) -> optax.GradientTransformation:
    """Returns the transformation of gradients.

    Args:
      letters: of each parameter, in a tree like the gradients.
      eps: added to the root of a second moment, as Adam's: the square of it is added to
        the square of the gradient.

    Source: Shazeer and Stern, "Adafactor" (arXiv:1804.04235), algorithms 4 and 5,
    without the factor of the parameter's own size: lr means the same as for AdamW.
    """

    def init(params):
        rows, columns = _averages(jax.tree.map(jnp.zeros_like, params), letters)
        return AdafactorState(jnp.zeros((), jnp.int32), rows, columns)

    def update(updates, state, params=None):
        del params
        num_updates = jnp.asarray(optax.safe_increment(state.num_updates))
        keep = 1 - num_updates.astype(jnp.float32) ** -DECAY_EXPONENT
        new = _averages(
            jax.tree.map(lambda g: jnp.square(g) + eps**2, updates), letters
        )
        rows, columns = jax.tree.map(
            lambda old, new: keep * old + (1 - keep) * new,
            (state.rows, state.columns),
            new,
        )
        updates = jax.tree.map(_scale, updates, rows, columns, letters)
        return updates, AdafactorState(num_updates, rows, columns)

    return optax.GradientTransformation(init, update)


def _averages(squares: Any, letters: Any) -> tuple[Any, Any]:
    def over(side: int):
        return jax.tree.map(
            lambda x, each: x.mean(_sides(each)[side], keepdims=True), squares, letters
        )

    return over(1), over(0)


def _scale(grad, rows, columns, letters: str):
    row_dims, column_dims = _sides(letters)
    shares = rows / rows.mean(row_dims, keepdims=True)
    update = grad * jax.lax.rsqrt(shares) * jax.lax.rsqrt(columns)
    rms = jnp.sqrt(jnp.square(update).mean(row_dims + column_dims, keepdims=True))
    return update / jnp.maximum(rms / UPDATE_RMS, 1.0)


def _sides(letters: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the dims of D and those of the other side; of no matrix, none and all."""
    core = [dim for dim, x in enumerate(letters) if x not in BATCH_LETTERS]
    rows = [dim for dim in core if letters[dim] == "D" and is_matrix(letters)]
    return tuple(rows), tuple(dim for dim in core if dim not in rows)
