# SPDX-License-Identifier: Apache-2.0
"""The reference attention, which is the specification, against loops in float64."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention.reference import masked_attention

attention = jax.jit(
    pallas_kernels.attention,
    static_argnames=("causal", "window", "softcap", "scale", "implementation"),
)

B, T, N, K, H = 2, 12, 4, 2, 8
EPS = float(np.finfo(np.float32).eps)
# Logits of unit variance are sums of H products, outputs sums of T; each rounds once.
TOLERANCE = 4 * EPS * math.sqrt(H * T)
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [1] + [0] * 2, [1] * 12], np.int32)


def draw(seed: int = 0, *, length: int = T, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    shapes = [(B, length, heads, H) for heads in (N, K, K)]
    return [jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in shapes]


def loops(q, k, v, *, sinks=None, softcap=None, scale=None, **masks):
    """Attention as its definition says: one query, head and key at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        group = n // (q.shape[2] // k.shape[2])
        weights = {}
        for s in filter(lambda s: in_sight(b, t, s, **masks), range(k.shape[1])):
            logit = scale * (q[b, t, n] @ k[b, s, group])
            weights[s] = (
                logit if softcap is None else softcap * np.tanh(logit / softcap)
            )
        top = max(weights.values(), default=0.0)
        total = sum(np.exp(w - top) for w in weights.values())
        total += 0.0 if sinks is None else np.exp(np.float64(sinks[n]) - top)
        for s, w in weights.items():
            out[b, t, n] += np.exp(w - top) / total * v[b, s, group]
    return out


def in_sight(b, t, s, *, causal=True, segments=None, positions=None, window=0) -> bool:
    place = t if positions is None else int(positions[b, t])
    if (causal and s > place) or (window and abs(s - place) >= window):
        return False
    if segments is None:
        return True
    between = segments[b, min(s, t) : max(s, t) + 1]
    return bool(segments[b, t] != 0 and np.all(between == segments[b, t]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_reference_is_its_definition(packed, window, softcap):
    q, k, v = draw()
    segments = jnp.asarray(SEGMENTS) if packed else None
    options: dict[str, Any] = dict(window=window, softcap=softcap)
    out = attention(q, k, v, segments_BT=segments, **options)
    expected = loops(q, k, v, segments=SEGMENTS if packed else None, **options)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("window", "num_keys"), [(0, T), (3, T), (0, 4)])
def test_without_causal_a_query_sees_both_sides(window, num_keys):
    q, k, v = draw()
    options: dict[str, Any] = dict(causal=False, window=window)
    out = attention(q, k[:, :num_keys], v[:, :num_keys], **options)
    expected = loops(q, k[:, :num_keys], v[:, :num_keys], **options)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


def test_a_sink_takes_its_share_of_every_query():
    q, k, v = draw()
    sinks = jnp.asarray([-np.inf, -1.0, 2.0, 100.0], jnp.float32)
    out = attention(q, k, v, segments_BT=jnp.asarray(SEGMENTS), sinks_N=sinks)
    expected = loops(q, k, v, segments=SEGMENTS, sinks=sinks)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)
    assert not np.any(out[:, :, 3])


def test_the_log_sum_is_that_of_the_logits_in_sight():
    q, k, v = draw()
    mask_BTS = np.random.default_rng(3).random((B, T, T)) < 0.2
    mask_BTS[0, 3] = False
    _, lse_BNT = masked_attention(
        q, k, v, jnp.asarray(mask_BTS), None, softcap=None, scale=1.0
    )
    k_BSNH = np.asarray(k).repeat(N // K, axis=2)
    logits_BNTS = np.einsum("BTNH,BSNH->BNTS", q, k_BSNH)
    with np.errstate(divide="ignore"):
        expected = np.log((np.exp(logits_BNTS) * mask_BTS[:, None]).sum(-1))
    np.testing.assert_allclose(lse_BNT, expected, rtol=2 * TOLERANCE)
    assert np.all(np.isneginf(lse_BNT[0, :, 3]))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_groups_of_query_heads_share_a_key_head(num_kv_heads):
    q = draw()[0]
    k, v = (x[:, :, :1].repeat(num_kv_heads, 2) for x in draw(1)[1:])
    k = k + jnp.arange(num_kv_heads, dtype=jnp.float32)[None, None, :, None]
    expected = loops(q, k, v, scale=0.3)
    out = attention(q, k, v, scale=0.3)
    np.testing.assert_allclose(out, expected, atol=4 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [0, 3])
def test_positions_say_which_keys_a_query_of_decoding_sees(window):
    q, k, v = draw()
    positions = np.array([[0, 7], [11, 3]], np.int32)
    out = attention(q[:, :2], k, v, positions_BT=jnp.asarray(positions), window=window)
    expected = loops(q[:, :2], k, v, positions=positions, window=window)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [0, 3])
def test_a_packed_row_gives_each_document_what_it_gets_alone(window):
    q, k, v = draw()
    out = attention(q, k, v, segments_BT=jnp.asarray(SEGMENTS), window=window)
    for start, stop in [(0, 5), (5, 9), (9, 10)]:
        alone = attention(*(x[:1, start:stop] for x in (q, k, v)), window=window)
        np.testing.assert_allclose(out[:1, start:stop], alone, atol=TOLERANCE, rtol=0)


def test_padding_gives_exactly_zero_and_takes_no_gradient():
    @jax.jit
    def both(q, k, v):
        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    def total(q, k, v):
        out = attention(q, k, v, segments_BT=jnp.asarray(SEGMENTS))
        return (out**2).sum(), out

    gradients, out = both(*draw())
    assert not np.any(out[0, 10:])
    assert np.all(np.any(out[0, :10], axis=(1, 2)))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[0, 10:])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_give_finite_outputs_and_gradients(softcap, dtype):
    q, k, v = (x.astype(dtype) for x in draw(scale=1e4))

    def total(q, k, v):
        segments = jnp.asarray(SEGMENTS)
        out = attention(q, k, v, segments_BT=segments, softcap=softcap)
        return out.astype(jnp.float32).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g.astype(jnp.float32))) for g in gradients)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_are_the_slopes_of_the_definition(softcap):
    q, k, v = draw()
    options: dict[str, Any] = dict(window=5, softcap=softcap)
    rng = np.random.default_rng(2)
    cotangent = rng.normal(size=q.shape)

    def total(q, k, v):
        out = attention(q, k, v, segments_BT=jnp.asarray(SEGMENTS), **options)
        return (out * jnp.asarray(cotangent, jnp.float32)).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    direction = [rng.normal(size=x.shape) for x in (q, k, v)]

    def at(step):
        pairs = zip((q, k, v), direction, strict=True)
        moved = [np.asarray(x, np.float64) + step * d for x, d in pairs]
        return (loops(*moved, segments=SEGMENTS, **options) * cotangent).sum()

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    got = sum(
        float((np.asarray(g) * d).sum())
        for g, d in zip(gradients, direction, strict=True)
    )
    scale = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    # The sum over all entries rounds like a random walk on the gradient's norm.
    assert got == pytest.approx(slope, abs=scale * 16 * TOLERANCE)


def test_bfloat16_accumulates_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in draw())
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    # Only weights (at most 1, summing to 1) and the result are rounded to 8 bits.
    bound = 2 * float(jnp.finfo(jnp.bfloat16).eps) * float(np.abs(v).max())
    exact = loops(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=bound, rtol=0)


def test_remat_and_jit_change_no_bit():
    q, k, v = draw()
    attend = functools.partial(attention, window=4)
    jitted = jax.jit(attend)(q, k, v)
    np.testing.assert_array_equal(jitted, jax.jit(jax.checkpoint(attend))(q, k, v))
