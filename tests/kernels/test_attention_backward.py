# SPDX-License-Identifier: Apache-2.0
"""The backward kernels in interpret mode, with races detected, against float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.attention import ranges
from pallas_kernels.attention.hopper import backward_fused as fused
from pallas_kernels.attention.hopper.passes import backward_split
from pallas_kernels.attention.reference import masked_attention
from pallas_kernels.attention.tiles import (
    BackwardTile,
    KeyGradientTile,
    QueryGradientTile,
)

# The least tiles, so that tiny arrays have several.
KEYS = KeyGradientTile(block_q=64)
SPLIT = BackwardTile(
    queries=QueryGradientTile(block_kv=64, num_value_stages=1), keys=KEYS
)
FUSED = {64: KeyGradientTile(block_q=128), 128: KEYS}
RAGGED = (1, 200, 150, 2, 1, 64)  # B, T, S, N, K, H: whole tiles of neither


@functools.partial(jax.jit, static_argnames=("softcap", "scale"))
def run_split(*inputs, softcap, scale):
    return backward_split(*inputs, softcap=softcap, scale=scale, tile=SPLIT)


@functools.partial(jax.jit, static_argnames=("softcap", "scale"))
def run_fused(*inputs, softcap, scale):
    tile = FUSED[inputs[0].shape[-1]]
    return fused.backward_fused(*inputs, softcap=softcap, scale=scale, tile=tile)


@functools.partial(jax.jit, static_argnames=("softcap", "scale"))
def in_plain_jax(q, k, v, dout, start, end, sinks, *, softcap, scale):
    """Returns out, lse and the gradients that JAX takes of the reference."""
    mask = ranges.visible_in_ranges(start, end, k.shape[1])

    def attend(q, k, v):
        return masked_attention(q, k, v, mask, sinks, softcap=softcap, scale=scale)

    out, transpose, lse = jax.vjp(attend, q, k, v, has_aux=True)
    return out, lse, transpose(dout)


def draw(shape, *, dtype: Any = jnp.bfloat16, size=1.0):
    """Returns (q, k, v, dout), and sinks, of random numbers for (B, T, S, N, K, H)."""
    b, t, s, n, k, h = shape
    rng = np.random.default_rng(0)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    arrays = [jnp.asarray(size * rng.normal(size=x), jnp.float32) for x in shapes]
    sinks = jnp.asarray(rng.normal(size=n), jnp.float32)
    return tuple(x.astype(dtype) for x in arrays), sinks


def visible(shape, **options):
    """Returns the ranges of a mask: `causal=True` and so on, as of `attention`."""
    b, t, s, n, _, h = shape
    nothing: dict[str, Any] = dict(
        causal=False, segments_BT=None, positions_BT=None, window=0
    )
    return ranges.key_ranges((b, t, n, h), s, **(nothing | options))


def random_ranges(shape, seed):
    b, t, s = shape[:3]
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.integers(0, s + 1, (b, t)), jnp.int32) for _ in "se")


def wide(x):
    """Returns x in float64, for use where float64 is enabled."""
    if x is None or x.dtype == jnp.int32:
        return x
    return jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64)


def error(x, exact) -> float:
    difference = np.asarray(x.astype(jnp.float32), np.float64) - np.asarray(exact)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(exact), 1e-30))


def gradients_of(run, arrays, out, lse, seen, **options):
    *qkv, dout = arrays
    with mosaic.interpret():
        return jax.block_until_ready(run(*qkv, out, lse, dout, *seen, **options))


def check(run, arrays, seen, sinks=None, *, softcap=None):
    """Compares gradients with float64: at most thrice the error of plain JAX."""
    options = dict(softcap=softcap, scale=arrays[0].shape[-1] ** -0.5)
    out, lse, plain = in_plain_jax(*arrays, *seen, sinks, **options)
    with jax.enable_x64(True):
        exact = in_plain_jax(*map(wide, (*arrays, *seen, sinks)), **options)[-1]
    gradients = gradients_of(run, arrays, out, lse, seen, **options)
    for x, like, by_jax, truth in zip(gradients, arrays, plain, exact, strict=False):
        assert (x.dtype, x.shape) == (like.dtype, like.shape)
        assert error(x, truth) <= 3 * error(by_jax, truth) + 1e-6
    return gradients


SEGMENTS = jnp.asarray([[1] * 70 + [2] * 3 + [1] * 60 + [0] * 17], jnp.int32)
MASKS = {
    "none": visible(RAGGED),
    "window": visible(RAGGED, window=40),
    "random": random_ranges(RAGGED, 0),
    "positions": visible(
        RAGGED, causal=True, positions_BT=jnp.arange(-20, 180, dtype=jnp.int32)[None]
    ),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("run", [run_split, run_fused])
def test_gradients_are_those_of_the_reference(run, mask):
    check(run, draw(RAGGED)[0], MASKS[mask])


SQUARE = (1, 150, 150, 2, 2, 64)


@pytest.mark.parametrize("run", [run_split, run_fused])
def test_documents_windows_caps_and_sinks_act_together(run):
    arrays, sinks = draw(SQUARE, size=2.0)
    seen = visible(SQUARE, causal=True, window=50, segments_BT=SEGMENTS)
    for x in check(run, arrays, seen, sinks, softcap=3.0):
        assert np.all(np.asarray(x[:, -17:], np.float32) == 0)  # padding


@pytest.mark.parametrize("h", [128, 256])
def test_wide_heads(h):
    shape = (1, 130, 130, 1, 1, h)
    arrays = draw(shape, dtype=jnp.float16)[0]
    seen = visible(shape, causal=True)
    gradients = check(run_split, arrays, seen)
    if h == 128:
        for x, y in zip(gradients, check(run_fused, arrays, seen), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-3, rtol=2e-3)


def test_extreme_logits_give_finite_gradients():
    """Rows that see one key all but alone have gradients of rounding errors only."""
    arrays, seen = draw(RAGGED, size=100.0)[0], MASKS["positions"]
    options = dict(softcap=None, scale=RAGGED[-1] ** -0.5)
    out, lse, _ = in_plain_jax(*arrays, *seen, None, **options)
    for x in gradients_of(run_split, arrays, out, lse, seen, **options):
        assert np.all(np.isfinite(x.astype(jnp.float32)))


def test_the_same_call_gives_the_same_bits():
    arrays, seen = draw(RAGGED)[0], MASKS["random"]
    first, second = (check(run_split, arrays, seen) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x.view(jnp.uint16), y.view(jnp.uint16))


def test_a_query_alone_gives_gradients():
    shape = (1, 1, 70, 2, 1, 64)
    check(run_fused, draw(shape)[0], visible(shape))


def test_overwriting_what_tma_still_reads_is_a_race(monkeypatch):
    wait = fused.plgpu.wait_smem_to_gmem

    def wait_at_the_end_only(number, wait_read_only=False):
        if not wait_read_only:
            wait(number)

    monkeypatch.setattr(fused.plgpu, "wait_smem_to_gmem", wait_at_the_end_only)
    run = functools.partial(fused.backward_fused, tile=FUSED[64])
    with pytest.raises(Exception, match=r"RACE DETECTED|data race"):
        check(run, draw(RAGGED)[0], MASKS["none"])


@pytest.mark.parametrize("h", [64, 128])
def test_a_fused_tile_whose_parts_are_not_one_a_warpgroup_is_refused(h):
    wrong = dataclasses.replace(FUSED[h], block_q={64: 64, 128: 128}[h])
    shape = (1, 128, 128, 1, 1, h)
    with pytest.raises(ValueError, match="one part of dQ for each warpgroup"):
        run = functools.partial(fused.backward_fused, tile=wrong)
        check(run, draw(shape)[0], visible(shape))
