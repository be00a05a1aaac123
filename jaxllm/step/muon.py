# SPDX-License-Identifier: Apache-2.0
"""Muon's part beyond momentum: the nearest orthogonal matrix, on any mesh.

Not Optax's: under automatic axes XLA gathers every layer's matrix on every device for
it, in every iteration, and each device does all the work.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sharding import STORAGE, spec

BATCH_LETTERS = "LPE"  # along these, a parameter is many independent ones
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration
NUM_ITERATIONS = 5
UPDATE_RMS = 0.2  # that of AdamW's updates in practice, so that both share an lr


def has_muon(letters: str) -> bool:
    """Returns whether Muon updates a parameter: matrices but embedding and output."""
    return is_matrix(letters) and "V" not in letters


def is_matrix(letters: str) -> bool:
    """Returns whether a parameter maps to or from the model width D.

    Embedding, output and every projection do; biases and the scales of norms do not
    ("NH", "F", "D", "H").
    """
    return "D" in letters and len(_core(letters)) > 1


def orthogonalize(update: jax.Array, letters: str) -> jax.Array:
    """Returns about U V^T of each matrix U S V^T, with an RMS of UPDATE_RMS.

    A matrix goes from its first dims to D, or from D to its last ones. Devices that
    have parts of the same layers exchange them, so that each does some layers whole.

    Source: Jordan, "Muon" (2024); the RMS is that of Liu et al., "Muon is Scalable for
    LLM Training" (arXiv:2502.16982).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _orthogonalize_part(update, letters, [None] * len(letters))
    placed = spec(letters, STORAGE, mesh)

    def part(block):
        return _orthogonalize_part(block, letters, tuple(placed))

    return jax.shard_map(part, in_specs=placed, out_specs=placed)(update)


def _orthogonalize_part(update, letters: str, placed: Sequence) -> jax.Array:
    order = _order(letters)
    num_batch = len(letters) - len(_core(letters))
    moved = update.transpose(order)
    batch, sides = moved.shape[:num_batch], moved.shape[num_batch:]
    x = moved.reshape(math.prod(batch), *sides)
    cuts = [
        (i, placed[dim]) for i, dim in enumerate(order[num_batch:], 1) if placed[dim]
    ]
    spare = -len(x) % math.prod(jax.lax.axis_size(axis) for _, axis in cuts)
    x = jnp.pad(x, [(0, spare)] + [(0, 0)] * len(sides))  # zeros stay zero
    # XLA would see that a part of the exchange is constant, and fails on its layout.
    x = jax.lax.optimization_barrier(x)
    for i, axis in cuts:
        x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=i, tiled=True)
    x = _newton_schulz(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
    for i, axis in reversed(cuts):
        x = jax.lax.all_to_all(x, axis, split_axis=i, concat_axis=0, tiled=True)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x[: math.prod(batch)].reshape(moved.shape).transpose(inverse)


def _newton_schulz(matrices: jax.Array) -> jax.Array:
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.swapaxes(1, 2)
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        square = jnp.einsum("lij,lkj->lik", x, x)
        polynomial = b * square + c * jnp.einsum("lij,ljk->lik", square, square)
        x = a * x + jnp.einsum("lij,ljk->lik", polynomial, x)
    # An orthogonal matrix has an RMS of 1 / sqrt(its longer side).
    x = x * (UPDATE_RMS * math.sqrt(x.shape[2]))
    return x if wide else x.swapaxes(1, 2)


def _order(letters: str) -> tuple[int, ...]:
    """Returns the dims with the batch first, then D, then the other side."""
    ranks = {letter: 0 for letter in BATCH_LETTERS} | {"D": 1}
    return tuple(sorted(range(len(letters)), key=lambda i: ranks.get(letters[i], 2)))


def _core(letters: str) -> str:
    return "".join(letter for letter in letters if letter not in BATCH_LETTERS)
