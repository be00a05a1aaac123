# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: attention over rows that the mesh axis `context` shards.

The chunks of a row lie on the devices in a zig-zag, for equal work under a causal mask.

A device has the queries, keys and values of its two chunks of a row. Queries stay; keys
and values come to them. With C devices, and k bytes of a device's keys and as many of
its values, a device sends

- `all_gather`: 2 (C - 1) k, and computes once with whole rows of keys. Backward the
  same again, and their gradients, float32, in a reduce-scatter: 2 (C - 1) k' for k'
  bytes of float32;
- `ring`: 2 (C - 1) k in C - 1 turns, each while it computes with the keys of the one
  before. No device ever has the whole row. Backward the same again, with C turns of
  the gradients, which arrive where their keys are from: 2 C k'.

Masks are ranges of keys in the order of the text; what other devices hold of a range
is a range again, so windows and documents are exact. Kernels skip what is out of sight,
and of a causal row every device sees the same number of pairs in every turn.

Source: Liu et al., "Ring Attention with Blockwise Transformers" (arXiv:2310.01889);
Llama Team, "The Llama 3 Herd of Models" (arXiv:2407.21783), section 3.3.2: all-gather.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import sharding
from pallas_kernels.attention import RangedAttention, key_ranges, merge_parts
from sharding import zigzag


@dataclasses.dataclass(frozen=True)
class ContextAttention:
    """Causal attention of a layer; to be called inside `sharding.local`."""

    attention: RangedAttention
    window: int
    exchange: Literal["all_gather", "ring"]

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        segments_BT: jax.Array | None = None,
        sinks_N: jax.Array | None = None,
    ) -> jax.Array:
        """Returns out_BTNH of this device's queries."""
        ranges = key_ranges_in_text(q_BTNH.shape, segments_BT, self.window)
        return attention_with_gradient(self, q_BTNH, k_BTKH, v_BTKH, *ranges, sinks_N)


def key_ranges_in_text(
    q_shape: tuple[int, ...], segments_BT: jax.Array | None, window: int
) -> tuple[jax.Array, jax.Array]:
    """Returns start_BT and end_BT: which places of the text a device's queries see."""
    length = q_shape[1] * jax.lax.axis_size(sharding.axes_of("T"))
    if segments_BT is not None:
        segments_BT = zigzag.gather_rows(segments_BT)
    ranges = key_ranges(
        (q_shape[0], length),
        length,
        causal=True,
        segments_BT=segments_BT,
        positions_BT=None,
        window=window,
    )
    start_BT, end_BT = map(zigzag.own_part, ranges)
    return start_BT, end_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_with_gradient(
    how: ContextAttention,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """Returns out_BTNH of this device's queries, with a gradient of its own."""
    return _forward(how, q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, sinks_N)[0]


def _forward(how, *inputs):
    *arrays, sinks_N = inputs
    forward = {"all_gather": _gather_forward, "ring": _ring_forward}[how.exchange]
    out_BTNH, lse_BNT = forward(how.attention, *arrays)
    if sinks_N is not None:
        # One more key for all devices together, without a value.
        sinks_BNT = jnp.broadcast_to(sinks_N[None, :, None], lse_BNT.shape)
        none_BTNH = jnp.zeros_like(out_BTNH)
        out_BTNH, lse_BNT = merge_parts(out_BTNH, lse_BNT, none_BTNH, sinks_BNT)
    # As in pallas_kernels: what remat shall keep must be named here.
    out_BTNH = checkpoint_name(out_BTNH, "attention")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _backward(how, saved, dout_BTNH):
    (*inputs, sinks_N), out_BTNH, lse_BNT = saved
    backward = {"all_gather": _gather_backward, "ring": _ring_backward}[how.exchange]
    dqkv = backward(how.attention, inputs, (out_BTNH, lse_BNT, dout_BTNH))
    dsinks_N = None
    if sinks_N is not None:
        delta_BTN = (_wide(out_BTNH) * _wide(dout_BTNH)).sum(-1)
        weight_BNT = jnp.exp(sinks_N[None, :, None] - lse_BNT)
        dsinks_N = -(weight_BNT * delta_BTN.swapaxes(1, 2)).sum((0, 2))
    return (
        *(d.astype(x.dtype) for d, x in zip(dqkv, inputs[:3], strict=True)),
        None,
        None,
        dsinks_N,
    )


attention_with_gradient.defvjp(_forward, _backward)


def _gather_forward(attention, q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT):
    k_BSKH, v_BSKH = map(zigzag.gather_rows, (k_BTKH, v_BTKH))
    return attention.forward(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def _gather_backward(attention, inputs, results):
    # Gathered again: kept, they would be the memory that the axis is there to save.
    q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT = inputs
    k_BSKH, v_BSKH = map(zigzag.gather_rows, (k_BTKH, v_BTKH))
    dq_BTNH, *dkv = attention.backward(
        q_BTNH, k_BSKH, v_BSKH, *results, start_BT, end_BT
    )
    return dq_BTNH, *(zigzag.scatter_rows(_wide(d)) for d in dkv)


# Keys and values are one array around a ring, as their gradients are: XLA hides one
# exchange behind a computation, and would wait for those of a second array.


def _ring_forward(attention, q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT):
    ring = Ring(start_BT, end_BT, k_BTKH.shape[1])

    def visit(merged, kv, turn):
        part = attention.forward(q_BTNH, *kv, *ring.ranges(turn))
        return merge_parts(*merged, *part)

    def go(carry, turn):
        kv, merged = carry
        return (ring.send(kv), visit(merged, kv, turn)), None

    b, t, n, _ = q_BTNH.shape
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    merged = jnp.zeros(q_BTNH.shape, wide), jnp.full((b, n, t), -jnp.inf, wide)
    turns = jnp.arange(ring.size - 1, dtype=jnp.int32)
    kv = jnp.stack((k_BTKH, v_BTKH))
    (kv, merged), _ = jax.lax.scan(go, (kv, merged), turns)
    out_BTNH, lse_BNT = visit(merged, kv, ring.size - 1)
    return out_BTNH.astype(q_BTNH.dtype), lse_BNT


def _ring_backward(attention, inputs, results):
    q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT = inputs
    ring = Ring(start_BT, end_BT, k_BTKH.shape[1])

    def visit(kv, turn):
        arrays = (q_BTNH, *kv, *results)
        dq_BTNH, *dkv = attention.backward(*arrays, *ring.ranges(turn))
        return _wide(dq_BTNH), jnp.stack(list(map(_wide, dkv)))

    # Gradients follow their keys a turn behind: they travel while the next are made.
    def add(dq_BTNH, dkv, kv, turn):
        arrived = ring.send(dkv)
        dq_part_BTNH, part = visit(kv, turn)
        return dq_BTNH + dq_part_BTNH, arrived + part

    def go(carry, turn):
        kv, dq_BTNH, dkv = carry
        return (ring.send(kv), *add(dq_BTNH, dkv, kv, turn)), None

    kv = jnp.stack((k_BTKH, v_BTKH))
    carry = (ring.send(kv), *visit(kv, 0))
    turns = jnp.arange(1, ring.size - 1, dtype=jnp.int32)
    (kv, dq_BTNH, dkv), _ = jax.lax.scan(go, carry, turns)
    dq_BTNH, dkv = add(dq_BTNH, dkv, kv, ring.size - 1)
    return dq_BTNH, *ring.send(dkv)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Devices that hand what they have to the next one, and what it is then."""

    start_BT: jax.Array  # in the text, as end_BT
    end_BT: jax.Array
    length: int  # tokens of a row that a device has

    @property
    def size(self) -> int:
        return jax.lax.axis_size(sharding.axes_of("T"))

    def send(self, x: jax.Array) -> jax.Array:
        """Returns what the device before this one has."""
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.lax.ppermute(x, sharding.axes_of("T"), pairs)

    def ranges(self, turn: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns which of the keys that are here in a turn the queries see."""
        device = jax.lax.axis_index(sharding.axes_of("T"))
        source = (device - turn) % self.size
        start_BT, end_BT = (
            zigzag.num_before(x, source, self.length)
            for x in (self.start_BT, self.end_BT)
        )
        return start_BT, end_BT


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
