# SPDX-License-Identifier: Apache-2.0
"""Sampling of tokens: a KV cache, and one compiled step a token.

What differs from one call to the next is data of two programs, never a part of them:
seed, temperature, top_k and top_p are arrays, a prompt is read in pieces of one width,
and the cache has one of a few lengths. So another prompt or seed compiles nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.models import Model, make_cache

PIECE = 64  # tokens of a prompt that are read at a time
SHORTEST_CACHE = 256  # positions; a multiple of PIECE, as every power of two above it
LEAST = 1e-6  # temperature above 0, and top_p: far below both, float32 has only 0
MOST_TEMPERATURE = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled from the logits."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens only; 0 is all
    top_p: float = 1.0  # sample from the fewest tokens of this probability
    seed: int = 0  # of the random numbers

    def __post_init__(self):
        if self.temperature != 0 and not LEAST <= self.temperature <= MOST_TEMPERATURE:
            raise InputError(
                f"--temperature={self.temperature} must be 0 (the likeliest token), or "
                f"from {LEAST:g} to {MOST_TEMPERATURE:g}; 0.8 is usual."
            )
        if self.top_k < 0:
            raise InputError(f"--top_k={self.top_k} must be at least 0 (0 is all).")
        if not LEAST <= self.top_p <= 1:
            raise InputError(
                f"--top_p={self.top_p} must be from {LEAST:g} to 1 (all tokens); "
                "--top_k=1 takes the likeliest token."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed={self.seed} must be from 0 to 2**32 - 1.")

    def arrays(self) -> dict[str, np.generic]:
        """Returns the fields as arguments of a compiled function."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "seed": np.uint32(self.seed),
        }


def cache_length(num_tokens: int) -> int:
    """Returns how many positions a cache has that is to hold so many."""
    return max(SHORTEST_CACHE, 1 << (num_tokens - 1).bit_length())


def sample_tokens(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    known_V: np.ndarray | None = None,
    ends: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yields for each new position the token of every prompt; None where it has ended.

    The tokens of a prompt do not depend on the other prompts. Runs on the mesh of
    `jax.set_mesh`, or on one device without one.

    Args:
      model: without parameters.
      params: placed on the mesh.
      prompts: token ids of the model, at least one each.
      max_tokens: largest number of new tokens, per prompt; at least 1.
      sampling: how each is sampled.
      known_V: bool; ids that may be drawn. None is all.
      ends: tokens after which a prompt has ended; they are not yielded.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = int(lengths.max())
    tokens_BT = np.zeros((len(prompts), math.ceil(width / PIECE) * PIECE), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    if known_V is None:
        known_V = np.ones(model.config.vocab_size, bool)
    rules = jax.device_put((known_V, sampling.arrays()), _place(jax.P()))

    fill, step = _compiled(model)
    # Padding behind a short prompt writes slots that are overwritten before any token
    # may see them. The last token of each prompt is for the first step.
    cache = _empty_cache(model.config, len(prompts), cache_length(width + max_tokens))
    for first in range(0, width - 1, PIECE):
        piece_BT = tokens_BT[:, first : first + PIECE]
        cache = fill(cache, params, piece_BT, np.int32(first))
    ids_B = tokens_BT[np.arange(len(prompts)), lengths - 1]
    drawn_B, cache = step(cache, params, ids_B, lengths - 1, *rules)
    ended = np.zeros(len(prompts), bool)
    for offset in range(max_tokens):
        ids_B = jax.device_get(drawn_B)
        ended |= np.isin(ids_B, list(ends))
        if ended.all():
            return
        if offset + 1 < max_tokens:  # runs while the caller shows this one
            slots_B = lengths + np.int32(offset)
            drawn_B, cache = step(cache, params, ids_B, slots_B, *rules)
        yield [None if done else int(i) for i, done in zip(ids_B, ended, strict=True)]


@functools.lru_cache(maxsize=8)
def _compiled(model: Model):
    """Returns the jitted functions; the same ones again, so that nothing recompiles."""
    return (
        jax.jit(functools.partial(_fill_cache, model), donate_argnums=0),
        jax.jit(functools.partial(_next_tokens, model), donate_argnums=0),
    )


def _empty_cache(config: ModelConfig, num_rows: int, length: int):
    """Returns zeros that the host made, so that there is nothing to compile."""
    make = functools.partial(make_cache, config, num_rows, length)

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spec = jax.P() if leaf.sharding is None else leaf.sharding.spec
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), _place(spec))

    return jax.tree.map(zeros, jax.eval_shape(make))


def _place(spec: jax.P) -> jax.NamedSharding | None:
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else jax.NamedSharding(mesh, spec)


def _fill_cache(model: Model, cache, params, tokens_BT, first):
    positions_T = first + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    positions_BT = jnp.broadcast_to(positions_T[None], tokens_BT.shape)
    return model.bind(params)(tokens_BT, positions_BT, cache=cache)[1]


def _next_tokens(model: Model, cache, params, tokens_B, slots_B, known_V, sampling):
    module = model.bind(params)
    x_BTD, cache = module(tokens_B[:, None], slots_B[:, None], cache=cache)
    logits_BV = module.logits(x_BTD)[:, 0]
    logits_BV = sharding.constrain(logits_BV, "BV", table={})  # whole on every device
    logits_BV = jnp.where(known_V[None], logits_BV, -jnp.inf)
    drawn_B = jax.lax.cond(
        sampling["temperature"] > 0,
        _draw,
        lambda logits_BV, *_: logits_BV.argmax(-1).astype(jnp.int32),
        *(logits_BV, slots_B + 1, sampling),
    )
    return drawn_B, cache


def _draw(logits_BV: jax.Array, positions_B: jax.Array, sampling):
    """Draws with a key of (seed, row, position), so that rows do not touch."""
    # The largest becomes 0, which no temperature makes infinite.
    logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    logits_BV = keep_likely(
        logits_BV / sampling["temperature"], sampling["top_k"], sampling["top_p"]
    )
    root = jax.random.key(sampling["seed"])
    rows_B = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)

    def draw(logits_V, row, position):
        key = jax.random.fold_in(jax.random.fold_in(root, row), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(logits_BV, rows_B, positions_B).astype(jnp.int32)


def keep_likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns logits with all but the top-k and top-p tokens at minus infinity.

    Args:
      logits_BV: float32.
      top_k: int32; 0 is all.
      top_p: float32; 1 is all.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration"
    (arXiv:1904.09751). Ties at the border are all kept.
    """

    def keep(logits_BV):
        v = logits_BV.shape[-1]
        sorted_BV = jax.lax.top_k(logits_BV, v)[0]
        last = jnp.where(top_k == 0, v, jnp.minimum(top_k, v)) - 1
        kth_B1 = jax.lax.dynamic_slice_in_dim(sorted_BV, last, 1, axis=1)
        sorted_BV = jnp.where(sorted_BV < kth_B1, -jnp.inf, sorted_BV)
        chances_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(chances_BV, axis=-1) - chances_BV  # of likelier tokens
        is_kept_BV = (before_BV < top_p) | (top_p == 1)
        pth_B1 = jnp.where(is_kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        return jnp.where(logits_BV < jnp.maximum(kth_B1, pth_B1), -jnp.inf, logits_BV)

    is_asked = (top_k > 0) | (top_p < 1)
    return jax.lax.cond(is_asked, keep, lambda logits_BV: logits_BV, logits_BV)
