# SPDX-License-Identifier: Apache-2.0
"""The forward kernel in interpret mode, with races detected, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mosaic
from pallas_kernels.attention import ranges
from pallas_kernels.attention.hopper import query_tiles
from pallas_kernels.attention.hopper.forward import forward_kernel
from pallas_kernels.attention.reference import masked_attention
from pallas_kernels.attention.tiles import ForwardTile

# The least tile, so that tiny arrays have several.
TILE = ForwardTile(block_q=64, block_kv=64, num_stages=2)
EPS = float(np.finfo(np.float32).eps)


@functools.partial(jax.jit, static_argnames=("softcap", "scale", "tile"))
def forward(*inputs, softcap, scale, tile=TILE):
    return forward_kernel(*inputs, softcap=softcap, scale=scale, tile=tile)


@functools.partial(jax.jit, static_argnames=("softcap", "scale"))
def in_plain_jax(q, k, v, start, end, sinks, *, softcap, scale):
    mask = ranges.visible_in_ranges(start, end, k.shape[1])
    return masked_attention(q, k, v, mask, sinks, softcap=softcap, scale=scale)


def draw(shape, *, dtype: Any = jnp.bfloat16, size=1.0, seed=0):
    """Returns [q, k, v] and sinks of random numbers for (B, T, S, N, K, H)."""
    b, t, s, n, k, h = shape
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (n,))
    arrays = [jnp.asarray(size * rng.normal(size=x), jnp.float32) for x in shapes]
    return [x.astype(dtype) for x in arrays[:3]], arrays[3]


def in_float64(*inputs, softcap, scale):
    with jax.enable_x64(True):
        wide = [
            x
            if x is None or x.dtype == jnp.int32
            else jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64)
            for x in inputs
        ]
        return [
            np.asarray(x) for x in in_plain_jax(*wide, softcap=softcap, scale=scale)
        ]


def error(x, exact) -> float:
    difference = np.asarray(x.astype(jnp.float32), np.float64) - exact
    return float(np.linalg.norm(difference) / max(np.linalg.norm(exact), 1e-30))


def check(qkv, visible, sinks=None, *, tile=TILE, spared=1e-6, **options):
    """Compares the kernel with float64: at most twice the error of plain JAX.

    `spared` is an error let through even where plain JAX makes none.
    """
    q, k, _ = qkv
    options = {"softcap": None, "scale": q.shape[-1] ** -0.5} | options
    inputs = (*qkv, *visible, sinks)
    exact, exact_lse = in_float64(*inputs, **options)
    plain, _ = in_plain_jax(*inputs, **options)
    with mosaic.interpret():
        out, lse = jax.block_until_ready(forward(*inputs, **options, tile=tile))
    assert out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    assert error(out, exact) <= 2 * error(plain, exact) + spared
    blind = np.isneginf(exact_lse)
    np.testing.assert_array_equal(np.isneginf(lse), blind)
    # 8 covers exp2, log2 and their bases.
    bound = 8 * EPS * np.abs(exact_lse[~blind]).max(initial=1.0)
    bound += rounding_of_lse(q, k, visible, exact_lse, **options)[~blind]
    assert (np.abs(np.asarray(lse)[~blind] - exact_lse[~blind]) <= bound).all()
    start, end = visible
    seen = np.asarray(ranges.visible_in_ranges(start, end, k.shape[1])).any(-1)
    assert not np.any(np.asarray(out.astype(jnp.float32))[~seen])
    return out


def rounding_of_lse(q, k, visible, lse_BNT, *, softcap, scale):
    """Returns what float32 sums of H products may change of lse_BNT, by their sizes."""
    q_BTNH, k_BSKH = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k))
    k_BSNH = k_BSKH.repeat(q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    logits_BNTS = scale * np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
    sizes_BNTS = scale * np.einsum("BTNH,BSNH->BNTS", abs(q_BTNH), abs(k_BSNH))
    if softcap is not None:
        tanh_BNTS = np.tanh(logits_BNTS / softcap)
        logits_BNTS, sizes_BNTS = softcap * tanh_BNTS, sizes_BNTS * (1 - tanh_BNTS**2)
    start, end = visible
    seen_BTS = np.asarray(ranges.visible_in_ranges(start, end, k.shape[1]))
    above_BNTS = np.where(seen_BTS[:, None], logits_BNTS - lse_BNT[..., None], -np.inf)
    sizes_BNT = (np.exp(above_BNTS) * sizes_BNTS).sum(-1)
    return np.sqrt(q.shape[-1]) * EPS * sizes_BNT


def masks(shape, **options):
    b, t, s, n, _, h = shape
    asked: dict[str, Any] = dict(
        causal=True, segments_BT=None, positions_BT=None, window=0
    )
    return ranges.key_ranges((b, t, n, h), s, **{**asked, **options})


DOCUMENTS = jnp.asarray(
    [[1] * 70 + [2] * 3 + [1] * 60 + [0] * 27, [0] * 9 + [5] * 151], jnp.int32
)
CHUNK = jnp.arange(90, 140, dtype=jnp.int32)[None]


@pytest.mark.parametrize(
    ("shape", "mask", "options"),
    [
        ((1, 256, 256, 1, 1, 64), {}, {}),
        ((2, 70, 70, 4, 2, 64), {}, {"sinks": True}),
        ((1, 150, 150, 2, 2, 64), {"window": 70}, {"softcap": 2.0, "sinks": True}),
        ((1, 131, 131, 1, 1, 64), {"window": 1}, {"scale": 0.3}),
        ((2, 160, 160, 1, 1, 64), {"segments_BT": DOCUMENTS}, {"sinks": True}),
        (
            (2, 160, 160, 1, 1, 64),
            {"segments_BT": DOCUMENTS, "window": 40, "causal": False},
            {"softcap": 5.0},
        ),
        ((1, 50, 200, 4, 1, 64), {"positions_BT": CHUNK}, {}),
        ((1, 1, 100, 3, 1, 64), {"positions_BT": jnp.asarray([[77]], jnp.int32)}, {}),
        ((1, 5, 300, 2, 1, 64), {"causal": False}, {"dtype": jnp.float16}),
        ((1, 65, 3, 1, 1, 64), {"causal": False}, {}),
        ((1, 130, 130, 1, 1, 128), {}, {"tile": ForwardTile(num_stages=3)}),
        ((1, 70, 70, 1, 1, 256), {"window": 60}, {"softcap": 20.0}),
        ((1, 200, 200, 1, 1, 64), {}, {"tile": ForwardTile(block_kv=128)}),
        ((1, 130, 130, 1, 1, 64), {}, {"tile": ForwardTile(num_stages=1)}),
    ],
)
def test_the_kernel_is_the_specification(shape, mask, options):
    options = dict(options)
    dtype = options.pop("dtype", jnp.bfloat16)
    qkv, sinks = draw(shape, dtype=dtype)
    sinks = sinks if options.pop("sinks", False) else None
    check(qkv, masks(shape, **mask), sinks, **options)


@st.composite
def any_ranges(draw, shape):
    """Draws ranges that no mask of ours may make, empty and backward ones too."""
    b, t, s = shape[:3]
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    start = rng.integers(0, s, (b, t))
    length = rng.integers(
        *draw(st.sampled_from([(0, 3), (-20, s), (0, s), (s, 2 * s)]))
    )
    end = np.minimum(start + length, s)
    for _ in range(draw(st.integers(0, 3))):
        first, size = rng.integers(0, t), rng.integers(1, t)
        start[:, first : first + size], end[:, first : first + size] = 0, s
    return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


MANY = (1, 150, 190, 2, 1, 64)


@given(any_ranges(MANY))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_ranges_are_honoured(drawn):
    qkv, sinks = draw(MANY)
    check(qkv, drawn, sinks)


def test_a_query_that_sees_nothing_gives_zero_and_no_log_sum():
    shape = (1, 130, 130, 1, 1, 64)
    qkv, sinks = draw(shape)
    nothing = masks(shape, segments_BT=jnp.zeros((1, 130), jnp.int32))
    assert not np.any(check(qkv, nothing))
    check(qkv, nothing, sinks)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits_give_what_they_should(softcap):
    shape = (1, 130, 130, 1, 1, 64)
    qkv, _ = draw(shape, size=35.0)
    # A weight's exponent is the difference of two numbers of 1e4, where float32 has
    # steps of 1e-3; bfloat16 may then round the weight of the greatest logit off 1.
    spared = float(jnp.finfo(jnp.bfloat16).eps) / 2
    check(qkv, masks(shape), softcap=softcap, scale=1.0, spared=spared)


def test_a_sink_of_any_size_is_right():
    shape = (1, 70, 70, 4, 1, 64)
    qkv, _ = draw(shape)
    sinks = jnp.asarray([-jnp.inf, -1e4, 30.0, 1e4], jnp.float32)
    out = check(qkv, masks(shape), sinks)
    with mosaic.interpret():
        alone, _ = forward(*qkv, *masks(shape), None, softcap=None, scale=64**-0.5)
    np.testing.assert_array_equal(out[:, :, :2], alone[:, :, :2])
    assert not np.any(out[:, :, 3])


@pytest.mark.parametrize("pairs", [(1, 1), (2, 3)])
def test_every_head_and_tile_has_one_block(pairs, monkeypatch):
    b, k = pairs
    monkeypatch.setattr(query_tiles, "L2_BYTES", 2**20)
    tiles = query_tiles.QueryTiles((b, 520, 2 * k, 64), (b, 2048, k, 64), 128, 64)
    found = jax.vmap(lambda i: tuple(vars(tiles.of_block(i)).values()))(
        jnp.arange(tiles.num_blocks, dtype=jnp.int32)
    )
    assert tiles.num_blocks == b * 2 * k * 5
    batch, head, kv_head, q_tile = map(np.asarray, found)
    np.testing.assert_array_equal(kv_head, head // 2)
    assert len(set(zip(batch, head, q_tile, strict=True))) == tiles.num_blocks
    assert (batch.max(), head.max(), q_tile.max()) == (b - 1, 2 * k - 1, 4)
