# SPDX-License-Identifier: Apache-2.0
"""Attention over rows that are cut, against attention over whole ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import sharding
from jaxllm.models.context_attention import ContextAttention, Ring, key_ranges_in_text
from pallas_kernels.attention import RangedAttention

B, T, N, K, H = 2, 64, 4, 2, 8
EXCHANGES = ("all_gather", "ring")
ALL = "documents, window and softcap"
MASKS = {
    "causal": (False, 0, None),
    "documents": (True, 0, None),
    ALL: (True, 11, 5.0),
    "window": (False, 7, None),
}


def heads(seed: int, num: int) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal((B, T, num, H))
    return jnp.asarray(values, jnp.float32)


def documents() -> np.ndarray:
    """Rows of six documents; then padding, and an id that returns."""
    lengths = [[9, 1, 17, 14, 3, 12, 8], [2, 30, 5, 5, 11, 7, 4]]
    ids = [1, 2, 3, 4, 5, 1, 0]
    return np.stack([np.repeat(ids, row) for row in lengths]).astype(np.int32)


def place(x, letters):
    return sharding.constrain(jnp.asarray(x), letters)


def to_zigzag(x: np.ndarray | jax.Array, size: int) -> np.ndarray:
    chunks = np.split(np.asarray(x), 2 * size, 1)
    order = [i for c in range(size) for i in (c, 2 * size - 1 - c)]
    return np.concatenate([chunks[i] for i in order], 1)


SINKS = jnp.array([0.3, -1.0, 2.0, 4.0], jnp.float32)


@functools.cache
def whole(mask: str, sinks: bool = False):
    """Returns output and gradients of attention on one device, from the reference."""
    packed, window, softcap = MASKS[mask]

    def run(q, k, v, *sinks_N):
        return pallas_kernels.attention(
            q,
            k,
            v,
            segments_BT=jnp.asarray(documents()) if packed else None,
            window=window,
            softcap=softcap,
            sinks_N=sinks_N[0] if sinks_N else None,
        )

    added = (SINKS,) if sinks else ()
    out, pullback = jax.vjp(run, heads(0, N), heads(1, K), heads(2, K), *added)
    return out, *pullback(heads(3, N))


@pytest.mark.parametrize(
    ("size", "mask"), [(4, mask) for mask in MASKS] + [(2, ALL), (8, ALL)]
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_cut_row_gives_the_output_and_gradients_of_a_whole_one(exchange, size, mask):
    packed, window, softcap = MASKS[mask]
    attend = ContextAttention(RangedAttention(softcap=softcap), window, exchange)
    segments = (documents(),) if packed else ()
    letters = ("BTNH", "BTKH", "BTKH", *("BT" for _ in segments))

    @jax.jit
    def run(dout, *arrays):
        out, pullback = jax.vjp(sharding.local(attend, letters, "BTNH"), *arrays)
        return out, *pullback(dout)[:3]

    with jax.set_mesh(sharding.make_mesh({"context": size}, jax.devices()[:size])):
        arrays = (heads(0, N), heads(1, K), heads(2, K), *segments)
        placed = [
            place(to_zigzag(x, size), a) for x, a in zip(arrays, letters, strict=True)
        ]
        found = run(place(to_zigzag(heads(3, N), size), "BTNH"), *placed)
    for name, x, expected in zip(
        ("out", "dq", "dk", "dv"), found, whole(mask), strict=True
    ):
        np.testing.assert_allclose(
            x, to_zigzag(expected, size), rtol=2e-5, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("mask", ["causal", ALL])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_sink_counts_once_for_a_cut_row(exchange, mask):
    packed, window, softcap = MASKS[mask]
    attend = ContextAttention(RangedAttention(softcap=softcap), window, exchange)
    segments = (documents(),) if packed else ()
    letters = ("BTNH", "BTKH", "BTKH", "N", *("BT" for _ in segments))

    def with_sinks(q, k, v, sinks_N, *segments):
        return attend(q, k, v, *segments, sinks_N=sinks_N)

    @jax.jit
    def run(dout, *arrays):
        out, pullback = jax.vjp(sharding.local(with_sinks, letters, "BTNH"), *arrays)
        return out, *pullback(dout)[:4]

    with jax.set_mesh(sharding.make_mesh({"context": 4, "tensor": 2})):
        arrays = (heads(0, N), heads(1, K), heads(2, K), SINKS, *segments)
        placed = [
            place(to_zigzag(a, 4) if "T" in x else a, x)
            for a, x in zip(arrays, letters, strict=True)
        ]
        found = run(place(to_zigzag(heads(3, N), 4), "BTNH"), *placed)
    for name, x, expected in zip(
        ("out", "dq", "dk", "dv", "dsinks"), found, whole(mask, True), strict=True
    ):
        wanted = expected if name == "dsinks" else to_zigzag(expected, 4)
        np.testing.assert_allclose(x, wanted, rtol=2e-5, atol=4e-6, err_msg=name)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_devices_see_equally_many_keys_of_a_causal_row(size):
    def count():
        start_BT, end_BT = key_ranges_in_text((1, 512 // size), None, 0)
        return (end_BT - start_BT).sum()[None]

    with jax.set_mesh(sharding.make_mesh({"context": size}, jax.devices()[:size])):
        pairs = sharding.local(lambda _: count(), ("BT",), jax.P("context"))(
            place(np.zeros((1, size), np.int32), "BT")
        )
    assert int(pairs.sum()) == 512 * 513 // 2
    assert int(pairs.max()) == int(pairs.min())


@pytest.mark.parametrize("size", [4, 8])
def test_a_turn_of_the_ring_has_the_same_pairs_on_every_device(size):
    length = 512 // size

    def count(_):
        ring = Ring(*key_ranges_in_text((1, length), None, 0), length)
        ranges = (ring.ranges(turn) for turn in range(size))
        return jnp.stack([(end_BT - start_BT).sum() for start_BT, end_BT in ranges])

    with jax.set_mesh(sharding.make_mesh({"context": size}, jax.devices()[:size])):
        run = sharding.local(count, ("BT",), jax.P("context"))
        pairs = run(place(np.zeros((1, size), np.int32), "BT"))
    by_device = np.asarray(pairs).reshape(size, size)
    assert (by_device == by_device[0]).all()  # the first turn too
    # The first has the diagonals of two chunks, 1 / (2 x 512 / size) more than others.
    np.testing.assert_allclose(by_device[0], 512 * 513 / 2 / size**2, rtol=0.05)
