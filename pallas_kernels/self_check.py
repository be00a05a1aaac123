# SPDX-License-Identifier: Apache-2.0
"""Kernels against plain JAX on the device at hand, to be called before training.

A broken driver, compiler or GPU gives wrong numbers, not errors. Each check runs an
operation and its gradients once, on a few tiles whose last ones are ragged, and
compares them with plain JAX in float32. It is no test of a kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.case import draw_normal
from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.norm import layer_norm, rms_norm
from pallas_kernels.target import current_target

# Roundings of the dtype, as a part of the whole, that are no cause for doubt: sums are
# float32, but what goes into a product and comes out is rounded. What a broken kernel
# gives is off by about its own size.
MOST_ROUNDINGS = 4


class KernelMismatch(Exception):
    """A kernel does not give the numbers of plain JAX on this device."""


def check_attention(
    implementation: str,
    dtype: str,
    *,
    num_groups: int,
    head_dim: int,
    packed: bool,
    **options: Any,
) -> None:
    """Checks attention over a row of 200 tokens.

    Args:
      num_groups: query heads of a key/value head.
      packed: whether the row is of documents, and padding at its end.
      options: of `attention`: window, softcap, deterministic.

    Raises:
      KernelMismatch: says what is off, and by how much.
    """
    t, k, h = 200, 2, head_dim
    many, few = (1, t, k * num_groups, h), (1, t, k, h)
    inputs = _draw(dtype, many, few, few, many)
    ends = jnp.array([37, 150, 190])
    places_T = jnp.arange(t)
    segments_T = (places_T[:, None] >= ends[None]).sum(-1) + 1
    segments_BT = jnp.where(places_T < 190, segments_T, 0)[None] if packed else None

    def both_passes(implementation, q_BTNH, k_BSKH, v_BSKH, dout_BTNH):
        def of_qkv(q_BTNH, k_BSKH, v_BSKH):
            return attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                segments_BT=segments_BT,
                implementation=implementation,
                **options,
            )

        return _with_gradients(of_qkv, (q_BTNH, k_BSKH, v_BSKH), dout_BTNH)

    _compare("attention", implementation, both_passes, tuple(inputs))


def check_norm(implementation: str, dtype: str, *, kind: str, width: int) -> None:
    """Checks a norm and, with it, the addition of a residual.

    Args:
      kind: "rmsnorm" or "layernorm".
      width: of the rows.

    Raises:
      KernelMismatch: says what is off, and by how much.
    """
    rows = (3, 37, width)
    x, y, *cotangents = _draw(dtype, rows, rows, rows, rows)
    scale, bias = _draw("float32", (width,), (width,))
    vectors = (scale,) if kind == "rmsnorm" else (scale, bias)
    function = rms_norm if kind == "rmsnorm" else layer_norm

    def both_passes(implementation, x, y, first, second, *vectors):
        def norm(x, y, *vectors):
            return function(
                x, *vectors, residual=y, eps=1e-6, implementation=implementation
            )

        return _with_gradients(norm, (x, y, *vectors), (first, second))

    _compare(kind, implementation, both_passes, (x, y, *cotangents, *vectors))


def check_cross_entropy(
    implementation: str, dtype: str, *, width: int, num_words: int, **options: Any
) -> None:
    """Checks the loss of 200 tokens, some of them without a target.

    Args:
      width: of the model.
      num_words: of the vocabulary on a device; at most 4096 of them are taken.
      options: of `linear_cross_entropy`: letters, softcap, z_loss.

    Raises:
      KernelMismatch: says what is off, and by how much.
    """
    num_words = min(num_words, 4096)
    letters = options["letters"]
    shape = (width, num_words) if letters == "DV" else (num_words, width)
    x_TD, w = _draw("float32", (200, width), shape)
    x_TD, w = x_TD.astype(dtype), (w * width**-0.5).astype(dtype)
    words_T = jnp.arange(200, dtype=jnp.int32) * 7919 % num_words
    targets_T = jnp.where(words_T % 5 == 0, -1, words_T)

    def both_passes(implementation, x_TD, w):
        terms = linear_cross_entropy(
            x_TD,
            w,
            targets_T,
            chunk_tokens=128,
            with_gradients=True,
            implementation=implementation,
            **options,
        )
        return terms._asdict()

    _compare("linear_cross_entropy", implementation, both_passes, (x_TD, w))


def check_grouped_matmul(
    implementation: str, dtype: str, *, width: int, num_columns: int
) -> None:
    """Checks 200 rows of four groups, of which one is empty and the last rows are none.

    Args:
      width: of the rows.
      num_columns: of the matrices; at most 1024 of them are taken.

    Raises:
      KernelMismatch: says what is off, and by how much.
    """
    columns = min(num_columns, 1024)
    x_TD, cotangent_TF = _draw(dtype, (200, width), (200, columns))
    (w_EDF,) = _draw("float32", (4, width, columns))
    w_EDF = (w_EDF * width**-0.5).astype(dtype)
    sizes_E = jnp.array([37, 0, 101, 40], jnp.int32)

    def both_passes(implementation, x_TD, w_EDF, cotangent_TF):
        def product(x_TD, w_EDF):
            return grouped_matmul(x_TD, w_EDF, sizes_E, implementation=implementation)

        return _with_gradients(product, (x_TD, w_EDF), cotangent_TF)

    _compare("grouped_matmul", implementation, both_passes, (x_TD, w_EDF, cotangent_TF))


def _with_gradients(function: Callable, inputs: tuple, cotangents: Any) -> dict:
    out, pull_back = jax.vjp(function, *inputs)
    gradients = pull_back(cotangents)
    return {"result": out} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def _draw(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(len(shapes)), len(shapes))
    return [
        draw_normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def _compare(operation: str, implementation: str, run: Callable, inputs: tuple) -> None:
    got = jax.jit(run, static_argnums=0)(implementation, *inputs)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(run, static_argnums=0)(
            "xla", *(x.astype(jnp.float32) for x in inputs)
        )
    bound = MOST_ROUNDINGS * float(jnp.finfo(inputs[0].dtype).eps)
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(exact), strict=True)
    for (path, x), y in pairs:
        off = float(jnp.linalg.norm((x.astype(y.dtype) - y).ravel()))
        size = float(jnp.linalg.norm(y.ravel()))
        if not off <= bound * size:  # nor if it is NaN
            name = jax.tree_util.keystr(path, simple=True, separator=" ")
            raise KernelMismatch(
                f"{operation} implementation={implementation} gives wrong numbers on "
                f"{current_target().kind}: its {name} differs from plain JAX by "
                f"{off / max(size, 1e-30):.1e} of its size, where {bound:.1e} would be "
                "rounding."
            )
