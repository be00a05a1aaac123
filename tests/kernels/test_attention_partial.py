# SPDX-License-Identifier: Apache-2.0
"""Attention in parts of the keys, put together again, against attention as one."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_attention, mosaic
from pallas_kernels.attention import RangedAttention, key_ranges, merge_parts
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.choice import Implementation
from pallas_kernels.target import Target, traced_for

B, T, N, K, H = 1, 96, 4, 2, 64
CUT = 50  # keys of the first part
SEGMENTS_BT = jnp.asarray([[1] * 30 + [2] * 51 + [3] * 10 + [0] * 5], jnp.int32)
MASKS: dict[str, Any] = dict(segments_BT=SEGMENTS_BT, window=33)
# name: (implementation, deterministic, dtype, rounding of a result)
WAYS: dict[str, tuple[Implementation, bool, Any, float]] = {
    "plain JAX": ("xla", True, jnp.float32, 2e-6),
    "split kernels": ("mosaic", True, jnp.bfloat16, 2.0**-7),
    "fused kernel": ("mosaic", False, jnp.bfloat16, 2.0**-7),
}


def draw(dtype) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    heads = (N, K, K, N)
    values = [rng.normal(size=(B, T, n, H)) for n in heads]
    return [jnp.asarray(x, jnp.float32).astype(dtype) for x in values]


def in_parts(attention: RangedAttention, q, k, v, dout):
    """Returns output and gradients, of keys that are in two places."""
    start_BT, end_BT = key_ranges(q.shape, T, causal=True, positions_BT=None, **MASKS)
    parts = [
        (
            k[:, keys],
            v[:, keys],
            *(jnp.clip(x - lo, 0, hi - lo) for x in (start_BT, end_BT)),
        )
        for lo, hi in ((0, CUT), (CUT, T))
        for keys in (slice(lo, hi),)
    ]
    out, lse = jnp.zeros(q.shape, jnp.float32), jnp.full((B, N, T), -jnp.inf)
    for part in parts:
        out, lse = merge_parts(out, lse, *attention.forward(q, *part))
    out = out.astype(q.dtype)
    found = [
        attention.backward(q, k, v, out, lse, dout, *ranges) for k, v, *ranges in parts
    ]
    dq = sum(dq.astype(jnp.float32) for dq, _, _ in found)
    dk, dv = (jnp.concatenate([part[i] for part in found], 1) for i in (1, 2))
    return out, dq, dk, dv


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("way", WAYS)
def test_parts_put_together_are_attention_over_all_keys(way, softcap):
    implementation, deterministic, dtype, rounding = WAYS[way]
    attention = RangedAttention(
        softcap, deterministic=deterministic, implementation=implementation
    )
    arrays = draw(dtype)
    kernels = mosaic.interpret() if implementation == "mosaic" else None
    with kernels or contextlib.nullcontext():
        found = jax.block_until_ready(
            jax.jit(lambda *x: in_parts(attention, *x))(*arrays)
        )

    def whole(q, k, v):
        return attention_reference(q, k, v, **MASKS, softcap=softcap, scale=H**-0.5)

    q, k, v, dout = (x.astype(jnp.float32) for x in arrays)
    out, pullback = jax.vjp(whole, q, k, v)
    for name, x, y in zip(
        ("out", "dq", "dk", "dv"), found, (out, *pullback(dout)), strict=True
    ):
        error = jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)
        assert float(error) <= rounding, name


def test_parts_that_see_nothing_merge_to_nothing():
    out, lse = jnp.zeros((1, 2, 1, 4)), jnp.full((1, 1, 2), -jnp.inf)
    merged, total = merge_parts(out, lse, out, lse)
    assert bool((merged == 0).all())
    assert bool(jnp.isneginf(total).all())


def test_only_the_kernels_and_plain_jax_take_ranges():
    q_BTNH = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    start_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    choose = functools.partial(
        choose_attention, q_BTNH, q_BTNH, start_BT=start_BT, deterministic=False
    )
    with traced_for(Target("gpu", "NVIDIA A100-SXM4-80GB", 108)):
        assert choose(implementation="auto").implementation == "xla"
        with pytest.raises(NotImplementedError, match="ranges of keys"):
            choose(implementation="cudnn")
