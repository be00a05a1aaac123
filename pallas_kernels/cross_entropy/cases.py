# SPDX-License-Identifier: Apache-2.0
"""Calls of the loss at the shapes of language models, and of its kernels alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Search, draw_normal
from pallas_kernels.cross_entropy.hopper.kernels import exponentials, make_gradient
from pallas_kernels.cross_entropy.op import linear_cross_entropy
from pallas_kernels.cross_entropy.tiles import (
    EXPONENTIALS,
    GRADIENT,
    TILES,
    Tile,
    find_tile,
    fit,
)
from pallas_kernels.target import H200


def cases() -> list[Case]:
    """Returns losses with their gradients, and what is between the matmuls of these."""
    return [
        _loss("llama3-8k", 8192, 4096, 128256, "DV"),
        _loss("llama3-8k-chunk1024", 8192, 4096, 128256, "DV", chunk_tokens=1024),
        _loss("gpt2-16k", 16384, 2048, 50304, "VD"),
        _loss("gemma2-8k", 8192, 2304, 256000, "VD", softcap=30.0, z_loss=1e-4),
        _between(EXPONENTIALS, 512, 128256),
        _between(EXPONENTIALS, 512, 128256, softcap=30.0),
        _between(EXPONENTIALS, 2048, 16032),  # an eighth of Llama 3's
        _between(GRADIENT, 512, 128256),
        _between(GRADIENT, 2048, 16032),
    ]


def tiny_cases() -> list[Case]:
    """Returns the same at shapes that interpret mode finishes in seconds."""
    return [
        _loss("tiny", 16, 64, 1024, "DV", chunk_tokens=8),
        _between(EXPONENTIALS, 8, 1024),
    ]


def _loss(
    name: str,
    num_tokens: int,
    d: int,
    num_words: int,
    letters: str,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int = 2048,
) -> Case:
    def loss(implementation, x_TD, w, targets_T):
        return linear_cross_entropy(
            x_TD,
            w,
            targets_T,
            letters=letters,
            z_loss=z_loss,
            softcap=softcap,
            chunk_tokens=chunk_tokens,
            with_gradients=True,
            implementation=implementation,
        )

    def make(key):
        keys = jax.random.split(key, 3)
        x_TD = draw_normal(keys[0], (num_tokens, d), jnp.bfloat16)
        w = (d**-0.5 * draw_normal(keys[1], shape, jnp.float32)).astype(jnp.bfloat16)
        targets_T = jax.random.randint(keys[2], (num_tokens,), -1, num_words, jnp.int32)
        return x_TD, w, targets_T

    shape = (d, num_words) if letters == "DV" else (num_words, d)
    return Case(
        operation="cross_entropy",
        name=f"backward-{name}",
        functions={name: functools.partial(loss, name) for name in ("mosaic", "xla")},
        inputs=tuple(jax.eval_shape(make, jax.random.key(0))),
        flops=6.0 * num_tokens * d * num_words,
        num_bytes=4.0 * num_tokens * d + (2.0 + 4.0) * d * num_words,
        tile=find_tile(H200, EXPONENTIALS, num_words),
        make_inputs=make,
        call=dict(direction="backward", softcap=softcap, z_loss=z_loss),
        gemms=("mosaic", "xla"),
    )


def _between(
    kernel: str, rows: int, num_words: int, *, softcap: float | None = None
) -> Case:
    """From logits to their logsumexp and gradient, with a search for one kernel."""
    shipped = {name: find_tile(H200, name, num_words) for name in TILES}

    def with_tile(tile: Tile) -> Callable:
        chosen = shipped | {kernel: tile}

        def kernels(logits_TV, targets_T):
            e = jax.new_ref(jax.lax.empty(logits_TV.shape, jnp.bfloat16))
            reference_T, total_T = exponentials(
                logits_TV,
                e,
                jnp.zeros((1,), jnp.int32),
                softcap=softcap,
                tile=chosen[EXPONENTIALS],
            )
            lse_T = reference_T + jnp.log(total_T)
            target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], -1)[:, 0]
            target_T, slope_T = _capped(target_T, softcap)
            make_gradient(
                e,
                jnp.exp(reference_T - lse_T),
                targets_T,
                (jnp.exp(target_T - lse_T) - 1) * slope_T,
                tile=chosen[GRADIENT],
            )
            return lse_T, e[...]

        return kernels

    def plain(logits_TV, targets_T, dtype=jnp.bfloat16):
        logits_TV, slope_TV = _capped(logits_TV, softcap)
        lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
        words_1V = jnp.arange(num_words, dtype=jnp.int32)[None]
        hit_TV = (words_1V == targets_T[:, None]).astype(jnp.float32)
        dlogits_TV = (jnp.exp(logits_TV - lse_T[:, None]) - hit_TV) * slope_TV
        return lse_T, dlogits_TV.astype(dtype)

    def make(key):
        keys = jax.random.split(key)
        logits_TV = 4 * draw_normal(keys[0], (rows, num_words), jnp.float32)
        return logits_TV, jax.random.randint(keys[1], (rows,), 0, num_words, jnp.int32)

    name = f"{kernel.removeprefix('cross_entropy_')}-{rows}x{num_words}"
    return Case(
        operation="cross_entropy",
        name=name if softcap is None else f"{name}-softcap",
        functions={"mosaic": with_tile(shipped[kernel]), "xla": plain},
        inputs=tuple(jax.eval_shape(make, jax.random.key(0))),
        flops=0.0,
        num_bytes=(4.0 + 2.0) * rows * num_words,
        tile=shipped[kernel],
        make_inputs=make,
        call=dict(direction="between"),
        reference=functools.partial(plain, dtype=jnp.float32),
        searches=(
            Search(
                kernel=kernel,
                call={},
                tiles=tuple(
                    dict.fromkeys(
                        fit(tile, num_words) for tile in TILES[kernel].candidates
                    )
                ),
                shipped=shipped[kernel],
                function=with_tile,
            ),
        ),
    )


def _capped(logits: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array]:
    if softcap is None:
        return logits, jnp.ones_like(logits)
    squashed = jnp.tanh(logits / softcap)
    return softcap * squashed, 1 - squashed**2
