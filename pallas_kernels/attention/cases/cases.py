# SPDX-License-Identifier: Apache-2.0
"""The calls of `shapes.py` as cases: what runs them, and the work they cannot avoid."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.cases.searches import searches
from pallas_kernels.attention.cases.shapes import (
    CALLS,
    DECODE,
    FUSED,
    SEARCHED,
    TINY,
    Call,
)
from pallas_kernels.attention.op import attention, attention_refusals
from pallas_kernels.attention.tiles import backward_tile, forward_tile, fused_tile
from pallas_kernels.case import Case
from pallas_kernels.target import Target

H200 = Target("gpu", "NVIDIA H200", 132)
# Plain JAX keeps some 6 float32 arrays of T x S a head; an H200 has 139 GiB.
MOST_LOGIT_BYTES = 100e9 / 6


def cases() -> list[Case]:
    """Returns forward passes, and forward with backward passes, of each call."""
    both = [dataclasses.replace(call, passes="both") for call in CALLS]
    fused = [
        dataclasses.replace(call, name=f"{call.name}-fused", deterministic=False)
        for call in both
        if call.name in FUSED
    ]
    return [_case(call) for call in (*CALLS, DECODE, *both, *fused)]


def tiny_cases() -> list[Case]:
    """Returns the same at shapes that interpret mode finishes in seconds."""
    return [_case(TINY), _case(dataclasses.replace(TINY, passes="both"))]


def _case(call: Call) -> Case:
    b, t, n, k, h = call.shape
    extra = call.extra()
    tensors = [(b, t, n, h), (b, call.s, k, h), (b, call.s, k, h), (b, t, n, h)]
    if call.passes == "forward":
        tensors.pop()  # the cotangent
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in tensors]
    others = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in extra.values()]
    functions = {"mosaic": _function(call, "mosaic"), "cudnn": _function(call, "cudnn")}
    if not _cudnn_can(call):
        functions.pop("cudnn")
    if 4 * b * n * t * call.s <= MOST_LOGIT_BYTES:
        functions["xla"] = _function(call, "xla")

    def make_inputs(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(inputs))
        drawn = [
            jax.random.normal(key, x.shape, x.dtype)
            for key, x in zip(keys, inputs, strict=True)
        ]
        return (*drawn, *map(jnp.asarray, extra.values()))

    # Bytes: queries, keys and values in, outputs out; and the same of their gradients.
    size = 2 * (2 * b * t * n * h + 2 * b * call.s * k * h)
    forward = call.passes == "forward"
    return Case(
        operation="attention",
        name=f"forward-{call.name}" if forward else f"forward-backward-{call.name}",
        functions=functions,
        inputs=(*inputs, *others),
        flops=_flops(call) * (1 if forward else 3.5),
        num_bytes=size * (1 if forward else 2),
        tile=_tile(call),
        make_inputs=make_inputs,
        call={} if call.num_keys else _facts(call),
        reference=_reference(call),
        searches=searches(call, H200) if call.name in SEARCHED else (),
        gemms=("xla",),
        in_ci=call.in_ci,
    )


def _tile(call: Call) -> Any:
    head_dim, causal = call.shape[-1], call.causal
    forward_one = forward_tile(H200, head_dim, causal=causal)
    if call.passes == "forward":
        return forward_one
    backward_one = backward_tile if call.deterministic else fused_tile
    return forward_one, backward_one(H200, head_dim, causal=causal)


def _flops(call: Call) -> float:
    """Counts the useful ones: two products for each key that a query sees."""
    _, _, n, _, h = call.shape
    start_BT, end_BT = map(np.asarray, call.ranges(call.extra()))
    return 4.0 * n * h * float((end_BT - start_BT).sum(dtype=np.float64))


def _facts(call: Call) -> dict[str, Any]:
    return dict(
        direction=call.passes,
        causal=call.causal,
        window=call.window,
        softcap=call.softcap,
        packed=bool(call.documents),
        sinks=call.sinks,
    )


def _cudnn_can(call: Call) -> bool:
    refusals = attention_refusals(
        target=H200,
        dtype="bfloat16",
        head_dim=call.shape[-1],
        causal=call.causal,
        packed=bool(call.documents),
        cached=bool(call.num_keys),
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        deterministic=False,
    )
    return not refusals["cudnn"]


def _function(call: Call, implementation: Any) -> Callable:
    names = tuple(call.extra())

    def attend(q, k, v, *others):
        return attention(
            *(q, k, v),
            **dict(zip(names, others, strict=True)),
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            deterministic=call.deterministic and implementation != "cudnn",
            implementation=implementation,
        )

    def both(q, k, v, dout, *others):
        # Sinks are the last of the others and have a gradient too.
        first = len(others) - call.sinks
        fixed, sinks = others[:first], others[first:]

        def run(q, k, v, *sinks):
            return attend(q, k, v, *fixed, *sinks)

        return jax.vjp(run, q, k, v, *sinks)[1](dout)

    return attend if call.passes == "forward" else both


def _reference(call: Call) -> Callable:
    """Returns plain JAX that works on a batch row and a head of keys at a time."""
    b, t, n, k, h = call.shape
    part = dataclasses.replace(call, shape=(1, t, n // k, 1, h))
    function, names = _function(part, "xla"), tuple(call.extra())

    def split(x, name):
        if name == "sinks_N":
            return jnp.tile(x.reshape(k, n // k), (b, 1))
        if name is not None:
            return x.repeat(k, axis=0)[:, None]
        heads = x.shape[2] // k
        x = x.reshape(b, x.shape[1], k, heads, h).transpose(0, 2, 1, 3, 4)
        return x.reshape(b * k, 1, x.shape[2], heads, h)

    def join(x):
        if x.ndim == 2:
            return x.reshape(b, n).sum(0)
        x = x.reshape(b, k, *x.shape[2:]).transpose(0, 2, 1, 3, 4)
        return x.reshape(b, x.shape[1], -1, h)

    def run(*inputs):
        kinds = [None] * (len(inputs) - len(names)) + list(names)
        parts = tuple(split(x, kind) for x, kind in zip(inputs, kinds, strict=True))
        return jax.tree.map(join, jax.lax.map(lambda x: function(*x), parts))

    return run
