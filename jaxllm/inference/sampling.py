# SPDX-License-Identifier: Apache-2.0
"""Sampling of tokens: a KV cache, and one compiled step a token."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from jaxllm.errors import InputError
from jaxllm.models import Model, make_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled from the logits."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens only; 0 is all
    top_p: float = 1.0  # sample from the fewest tokens of this probability
    seed: int = 0  # of the random numbers

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"--temperature={self.temperature} must be at least 0 (0 takes the "
                "likeliest token)."
            )
        if self.top_k < 0:
            raise InputError(f"--top_k={self.top_k} must be at least 0 (0 is all).")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p={self.top_p} must be above 0, at most 1 (all).")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed={self.seed} must be from 0 to 2**32 - 1.")


def sample_tokens(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    end_of_document: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields for each new position the token of every prompt; None where it has ended.

    The tokens of a prompt do not depend on the other prompts. Runs on the mesh of
    `jax.set_mesh`, or on one device without one.

    Args:
      model: without parameters.
      params: placed on the mesh.
      prompts: token ids, at least one each.
      max_tokens: largest number of new tokens, per prompt.
      sampling: how each is sampled.
      end_of_document: the token after which a prompt has ended; it is not yielded.

    Raises:
      InputError: an empty prompt, or an id that the model does not know.
    """
    _check_prompts(model, prompts, max_tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = int(lengths.max())
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt

    fill, draw, step = _compiled(model, sampling)
    # Padding behind a short prompt writes slots that are overwritten before any token
    # may see them.
    cache = make_cache(model.config, len(prompts), width + max_tokens)
    logits_BV, cache = fill(params, tokens_BT, lengths, cache)
    tokens_B = draw(logits_BV, lengths)
    ended = np.zeros(len(prompts), bool)
    for offset in range(max_tokens):
        ids = jax.device_get(tokens_B)
        if end_of_document is not None:
            ended |= ids == end_of_document
        if ended.all():
            return
        if offset + 1 < max_tokens:
            tokens_B, cache = step(params, cache, tokens_B, lengths + offset)
        yield [None if done else int(i) for i, done in zip(ids, ended, strict=True)]


@functools.lru_cache(maxsize=8)
def _compiled(model: Model, sampling: Sampling):
    """Returns the jitted functions; the same ones again, so that nothing recompiles."""
    return (
        jax.jit(functools.partial(_fill_cache, model), donate_argnums=3),
        jax.jit(functools.partial(_draw, sampling)),
        jax.jit(functools.partial(_next_tokens, model, sampling), donate_argnums=1),
    )


def _fill_cache(model: Model, params, tokens_BT, lengths_B, cache):
    b, t = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    module = model.bind(params)
    x_BTD, cache = module(tokens_BT, positions_BT, cache=cache)
    last_BT = positions_BT == lengths_B[:, None] - 1
    x_BTD = jnp.where(last_BT[..., None], x_BTD, 0).sum(1, keepdims=True)
    return module.logits(x_BTD)[:, 0], cache


def _next_tokens(model: Model, sampling: Sampling, params, cache, tokens_B, slots_B):
    module = model.bind(params)
    x_BTD, cache = module(tokens_B[:, None], slots_B[:, None], cache=cache)
    return _draw(sampling, module.logits(x_BTD)[:, 0], slots_B + 1), cache


def _draw(sampling: Sampling, logits_BV: jax.Array, positions_B: jax.Array):
    """Draws with a key of (seed, row, position), so that rows do not touch."""
    logits_BV = sharding.constrain(logits_BV, "BV", table={})  # whole on every device
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = keep_likely(logits_BV / sampling.temperature, sampling)
    root = jax.random.key(sampling.seed)
    rows_B = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)

    def draw(logits_V, row, position):
        key = jax.random.fold_in(jax.random.fold_in(root, row), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(logits_BV, rows_B, positions_B).astype(jnp.int32)


def keep_likely(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns logits with all but the top-k and top-p tokens at minus infinity.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration"
    (arXiv:1904.09751). Ties at the border are all kept.
    """
    v = logits_BV.shape[-1]
    if 0 < sampling.top_k < v:
        lowest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jax.lax.top_k(logits_BV, v)[0]
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1)
        before_BV = before_BV - jax.nn.softmax(sorted_BV)  # held by likelier tokens
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        lowest_B1 = kept_BV.min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return logits_BV


def _check_prompts(model: Model, prompts, max_tokens: int):
    if max_tokens < 1:
        raise InputError(f"--max_tokens={max_tokens} must be at least 1.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(
                f"prompt {number} has no token; give at least one character, or leave "
                "the prompt out to start a new document."
            )
        unknown = [t for t in prompt if not 0 <= t < model.config.vocab_size]
        if unknown:
            raise InputError(
                f"prompt {number} has token {unknown[0]}, but the model's "
                f"vocab_size={model.config.vocab_size}; use the tokenizer of its data."
            )
