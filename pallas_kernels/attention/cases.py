# SPDX-License-Identifier: Apache-2.0
"""Calls of attention at the shapes of models: to compile, to check and to time."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.hopper import passes
from pallas_kernels.attention.hopper.backward_fused import backward_fused
from pallas_kernels.attention.hopper.forward import forward_kernel
from pallas_kernels.attention.op import attention, choose_attention
from pallas_kernels.attention.ranges import key_ranges
from pallas_kernels.attention.tiles import (
    FORWARD,
    FUSED_GRADIENT,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    BackwardTile,
    ForwardTile,
    Kernel,
    KeyGradientTile,
    QueryGradientTile,
    find_backward_tile,
    find_tile,
)
from pallas_kernels.case import Case, Search, draw_normal
from pallas_kernels.target import H200, traced_for

# Plain JAX keeps some 6 float32 arrays of T x S a head; an H200 has 139 GiB.
MOST_LOGIT_BYTES = 100e9 / 6


@dataclasses.dataclass(frozen=True)
class Call:
    """What is asked of attention; `passes` says how much of it is timed."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, T, N, K, H
    causal: bool = True
    window: int = 0
    softcap: float | None = None
    documents: int = 0  # packed into each row; 0 is no segments
    sinks: bool = False
    num_keys: int = 0  # of a cache, whose last place each query takes; 0 is T
    passes: Literal["forward", "both"] = "forward"
    deterministic: bool = True
    in_ci: bool = False

    @property
    def s(self) -> int:
        return self.num_keys or self.shape[1]

    def segments_BT(self) -> np.ndarray:
        """Returns documents of random lengths, the same ones each time."""
        b, t = self.shape[:2]
        rng = np.random.default_rng(0)
        ends = rng.random((b, self.documents - 1, 1)) * t
        return 1 + (np.arange(t) >= ends).sum(1).astype(np.int32)

    def ranges(self, extra: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns start_BT and end_BT."""
        masks = {"segments_BT": None, "positions_BT": None, **extra}
        masks.pop("sinks_N", None)
        b, t, n, _, h = self.shape
        options: dict[str, Any] = dict(causal=self.causal, window=self.window, **masks)
        return key_ranges((b, t, n, h), self.s, **options)

    def extra(self) -> dict[str, Any]:
        """Returns the arrays besides q, k and v, by the name of their argument."""
        b, t, n, _, _ = self.shape
        found: dict[str, Any] = {}
        if self.documents:
            found["segments_BT"] = self.segments_BT()
        if self.num_keys:
            found["positions_BT"] = np.full((b, t), self.s - 1, np.int32)
        if self.sinks:
            found["sinks_N"] = np.linspace(-1, 1, n, dtype=np.float32)
        return found


MHA = {
    64: (2, 8192, 32, 32, 64),
    128: (2, 8192, 16, 16, 128),
    256: (2, 8192, 8, 8, 256),
}
LLAMA = (4, 4096, 32, 8, 128)
CALLS = (
    Call("h64-causal-8k", MHA[64], in_ci=True),
    Call("h128-causal-8k", MHA[128], in_ci=True),
    Call("h256-causal-8k", MHA[256], in_ci=True),
    Call("h64-full-4k", (4, 4096, 32, 32, 64), causal=False),
    Call("h128-full-4k", (4, 4096, 16, 16, 128), causal=False),
    Call("h256-full-4k", (4, 4096, 8, 8, 256), causal=False),
    Call("h128-causal-1k", (16, 1024, 16, 16, 128)),
    Call("h128-causal-32k", (1, 32768, 16, 16, 128)),
    Call("h128-llama-4k", LLAMA),
    Call("h128-packed-8k", (2, 8192, 32, 8, 128), documents=12),
    Call("h256-gemma-4k", (4, 4096, 8, 4, 256), window=1024, softcap=50.0, in_ci=True),
    Call("h64-sinks-4k", (4, 4096, 64, 8, 64), window=128, sinks=True),
)
DECODE = Call("h128-decode-8k", (64, 1, 32, 8, 128), num_keys=8192)
TINY = Call("h64-tiny", (1, 72, 2, 1, 64), documents=2, sinks=True)
FUSED = ("h64-causal-8k", "h128-causal-8k", "h128-llama-4k")
SEARCHED = tuple(call.name for call in CALLS[:6]) + tuple(
    f"{name}-fused" for name in FUSED[:2]
)


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
    functions = {"mosaic": _function(call, "mosaic")}
    if _cudnn_can(call):
        functions["cudnn"] = _function(call, "cudnn")
    if 4 * b * n * t * call.s <= MOST_LOGIT_BYTES:
        functions["xla"] = _function(call, "xla")

    def make_inputs(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(inputs))
        drawn = [
            draw_normal(key, x.shape, x.dtype)
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
        searches=_searches(call) if call.name in SEARCHED else (),
        gemms=("xla",),
        in_ci=call.in_ci,
    )


def _tile(call: Call) -> Any:
    head_dim, causal = call.shape[-1], call.causal
    forward = find_tile(H200, FORWARD, head_dim, causal=causal)
    if call.passes == "forward":
        return forward
    if call.deterministic:
        return forward, find_backward_tile(H200, head_dim, causal=causal)
    return forward, find_tile(H200, FUSED_GRADIENT, head_dim, causal=causal)


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
    b, t, n, k, h = call.shape
    q_BTNH = jax.ShapeDtypeStruct((b, t, n, h), jnp.bfloat16)
    k_BSKH = jax.ShapeDtypeStruct((b, call.s, k, h), jnp.bfloat16)
    with traced_for(H200), contextlib.suppress(NotImplementedError):
        choose_attention(
            q_BTNH,
            k_BSKH,
            **call.extra(),
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            deterministic=False,
            implementation="cudnn",
        )
        return True
    return False


def _function(call: Call, implementation: Any) -> Callable:
    names = tuple(call.extra())

    def forward(q_BTNH, k_BSKH, v_BSKH, *others):
        return attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            **dict(zip(names, others, strict=True)),
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            deterministic=call.deterministic and implementation != "cudnn",
            implementation=implementation,
        )

    def forward_backward(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, *others):
        # Sinks are the last of the others and have a gradient too.
        first = len(others) - call.sinks
        fixed, sinks = others[:first], others[first:]

        def of_sinks(q_BTNH, k_BSKH, v_BSKH, *sinks):
            return forward(q_BTNH, k_BSKH, v_BSKH, *fixed, *sinks)

        return jax.vjp(of_sinks, q_BTNH, k_BSKH, v_BSKH, *sinks)[1](dout_BTNH)

    return forward if call.passes == "forward" else forward_backward


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

    def by_parts(*inputs):
        kinds = [None] * (len(inputs) - len(names)) + list(names)
        parts = tuple(split(x, kind) for x, kind in zip(inputs, kinds, strict=True))
        return jax.tree.map(join, jax.lax.map(lambda x: function(*x), parts))

    return by_parts


def _searches(call: Call) -> tuple[Search, ...]:
    """Returns the search of each kernel that a call runs, but for the forward one of a
    call with both passes, which has its own case."""
    head_dim, causal = call.shape[-1], call.causal
    if call.passes == "forward":
        return (_search(call, FORWARD, functools.partial(_run_forward, call)),)
    if not call.deterministic:
        run = functools.partial(_run_both, call, backward_fused)
        return (_search(call, FUSED_GRADIENT, run),)
    run = functools.partial(_run_both, call, passes.backward_split)
    both = find_backward_tile(H200, head_dim, causal=causal)

    def with_queries(tile: QueryGradientTile) -> Callable:
        return run(BackwardTile(queries=tile, keys=both.keys))

    def with_keys(tile: KeyGradientTile) -> Callable:
        return run(BackwardTile(queries=both.queries, keys=tile))

    return (
        _search(call, QUERY_GRADIENT, with_queries),
        _search(call, KEY_GRADIENT, with_keys),
    )


def _search(call: Call, kernel: Kernel, function: Callable) -> Search:
    """Returns the search of one kernel; function makes a call of one of its tiles."""
    head_dim, causal = call.shape[-1], call.causal
    return Search(
        kernel=kernel.name,
        call={"head_dim": head_dim, "causal": causal},
        tiles=kernel.tiles[head_dim].candidates,
        shipped=find_tile(H200, kernel, head_dim, causal=causal),
        function=function,
    )


def _run_forward(call: Call, tile: ForwardTile) -> Callable[..., jax.Array]:
    def forward(q_BTNH, k_BSKH, v_BSKH, *others):
        extra = dict(zip(call.extra(), others, strict=True))
        return _forward_kernel(call, tile, q_BTNH, k_BSKH, v_BSKH, extra)[0]

    return forward


def _run_both(
    call: Call, backward: Callable, tile: BackwardTile | KeyGradientTile
) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns both passes, for the backward kernels need what forward leaves."""
    h = call.shape[-1]
    forward_tile = find_tile(H200, FORWARD, h, causal=call.causal)

    def forward_backward(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, *others):
        extra = dict(zip(call.extra(), others, strict=True))
        out_BTNH, lse_BNT = _forward_kernel(
            call, forward_tile, q_BTNH, k_BSKH, v_BSKH, extra
        )
        return backward(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            out_BTNH,
            lse_BNT,
            dout_BTNH,
            *call.ranges(extra),
            softcap=call.softcap,
            scale=h**-0.5,
            tile=tile,
        )

    return forward_backward


def _forward_kernel(call, tile, q_BTNH, k_BSKH, v_BSKH, extra):
    start_BT, end_BT = call.ranges(extra)
    return forward_kernel(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        start_BT,
        end_BT,
        extra.get("sinks_N"),
        softcap=call.softcap,
        scale=call.shape[-1] ** -0.5,
        tile=tile,
    )
