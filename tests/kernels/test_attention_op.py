# SPDX-License-Identifier: Apache-2.0
"""The attention operation: its choice, its gradients, and what it says of wrong use."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import choose_attention, mosaic
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.case import draw_normal
from pallas_kernels.choice import Choice, Implementation
from pallas_kernels.target import H200, INTERPRETED, Target, traced_for

A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", 108)
CPU = Target("cpu", "cpu", 1)
INTEGERS_BT = jax.ShapeDtypeStruct((1, 8), jnp.int32)
PACKED: dict[str, Any] = dict(segments_BT=INTEGERS_BT)
CACHED: dict[str, Any] = dict(positions_BT=INTEGERS_BT)
SINKS: dict[str, Any] = dict(sinks_N=jax.ShapeDtypeStruct((2,), jnp.float32))


def chosen(
    implementation: Implementation,
    *,
    target: Target,
    dtype: str = "bfloat16",
    head_dim: int = 64,
    deterministic: bool = False,
    **asked: Any,
) -> Choice:
    """Returns the choice for a device that need not be there."""
    q_BTNH = jax.ShapeDtypeStruct((1, 8, 2, head_dim), jnp.dtype(dtype))
    with mosaic.interpret() if target == INTERPRETED else traced_for(target):
        return choose_attention(
            q_BTNH,
            q_BTNH,
            **asked,
            deterministic=deterministic,
            implementation=implementation,
        )


@pytest.mark.parametrize(
    "asked",
    [
        {},
        dict(window=7, softcap=50.0, deterministic=True) | PACKED | SINKS,
        dict(head_dim=256, dtype="float16") | CACHED,
        dict(causal=False, window=9, head_dim=128),
    ],
)
@pytest.mark.parametrize("target", [H200, INTERPRETED])
def test_on_hopper_auto_takes_the_kernels_for_everything(target, asked):
    choice = chosen("auto", target=target, **asked)
    assert choice == ("mosaic", "honours all that was asked")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(target=A100), "device NVIDIA A100"),
        (dict(dtype="float32"), "dtype float32"),
        (dict(head_dim=96), "head width 96"),
        (dict(scale=-1.0), "scale -1.0"),
    ],
)
def test_the_kernels_are_refused_for_what_they_cannot_do(change, reason):
    asked = {"target": H200, **change}
    with pytest.raises(NotImplementedError, match=reason) as error:
        chosen("mosaic", **asked)
    assert "use" in str(error.value) and "xla" in str(error.value)
    implementation, why = chosen("auto", **asked)
    assert implementation != "mosaic"
    assert reason in why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(target=CPU), "platform cpu"),
        (dict(target=INTERPRETED), "platform gpu"),
        (dict(dtype="float32"), "dtype float32"),
        (dict(head_dim=60), "head width 60"),
        (dict(head_dim=256), "head width 256"),
        (PACKED, "segments"),
        (CACHED, "query positions"),
        (dict(softcap=50.0), "softcap 50.0"),
        (SINKS, "sinks"),
        (dict(causal=False, window=3), "window 3 without causal"),
        (dict(deterministic=True), "deterministic gradients"),
    ],
)
def test_cudnn_is_refused_for_each_thing_it_would_get_wrong(change, reason):
    asked = {"target": A100, **change}
    with pytest.raises(NotImplementedError, match=reason):
        chosen("cudnn", **asked)
    assert chosen("auto", **asked)[0] != "cudnn"
    assert chosen("xla", **asked) == ("xla", "asked for")


def test_cudnn_refusals_are_all_named_at_once():
    with pytest.raises(NotImplementedError) as error:
        chosen("cudnn", target=CPU, dtype="float32", head_dim=3, **PACKED)
    for word in ("platform", "dtype", "head width", "segments"):
        assert word in str(error.value)


def test_auto_takes_cudnn_where_it_honours_everything_and_the_kernels_do_not():
    implementation, why = chosen("auto", target=A100)
    assert implementation == "cudnn"
    assert "mosaic: no device NVIDIA A100" in why
    assert chosen("cudnn", target=A100) == ("cudnn", "asked for")
    assert chosen("auto", target=H200, head_dim=192)[0] == "cudnn"


def test_the_operation_takes_the_device_it_is_traced_for():
    q, k, v = draw(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="platform cpu"):
        pallas_kernels.attention(q, k, v, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="device cpu"):
        pallas_kernels.attention(q, k, v, implementation="mosaic")
    assert "attention_forward" not in jaxpr(q, k, v)
    with mosaic.interpret():
        assert "attention_forward" in jaxpr(q, k, v)
        assert "attention_forward" not in jaxpr(q, k, v, implementation="xla")


def jaxpr(q, k, v, **options) -> str:
    call = functools.partial(pallas_kernels.attention, **options)
    return str(jax.make_jaxpr(lambda q, k, v: call(q, k, v))(q, k, v))


B, T, N, K, H = 1, 80, 4, 2, 64
SEGMENTS_BT = jnp.asarray([[1] * 30 + [2] * 45 + [0] * 5], jnp.int32)


def draw(dtype, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, heads, H) for heads in (N, K, K)]
    return [jnp.asarray(rng.normal(size=s), jnp.float32).astype(dtype) for s in shapes]


def gradients(attend, q, k, v, sinks, cotangent):
    def total(q, k, v, sinks):
        out = attend(q, k, v, sinks_N=sinks)
        return (out.astype(cotangent.dtype) * cotangent).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(q, k, v, sinks)


def distance(x, exact) -> float:
    exact = np.asarray(exact)
    x = np.asarray(x.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("options", "deterministic"),
    [
        (dict(segments_BT=SEGMENTS_BT, window=40, softcap=3.0), True),
        (dict(causal=False), False),
    ],
)
def test_gradients_are_those_of_the_specification(options, deterministic):
    q, k, v = draw(jnp.bfloat16)
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 5.0], jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    attend = functools.partial(pallas_kernels.attention, **options)
    plain = gradients(
        functools.partial(attend, implementation="xla"), q, k, v, sinks, cotangent
    )
    with mosaic.interpret():
        ours = gradients(
            functools.partial(attend, deterministic=deterministic),
            q,
            k,
            v,
            sinks,
            cotangent,
        )
        jax.block_until_ready(ours)
    with jax.enable_x64(True):
        wide = [
            jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64)
            for x in (q, k, v, sinks, cotangent)
        ]
        reference = functools.partial(attention_reference, scale=H**-0.5, **options)
        exact = gradients(reference, *wide)
    for name, x, y, z in zip("qkvs", ours, plain, exact, strict=True):
        assert x.dtype == y.dtype
        assert distance(x, z) <= 3 * distance(y, z) + 1e-5, name


@pytest.mark.parametrize(
    ("t", "options"),
    [
        (1, dict(positions_BT=[[40], [3], [-1]])),
        (3, dict(positions_BT=[[7, 8, 9], [70, 79, 20], [0, 1, 2]], window=6)),
        (2, dict(causal=False, softcap=3.0)),
    ],
)
def test_few_queries_attend_as_well_in_blocks_of_all_heads_that_share_keys(t, options):
    b, s, n, k, h = 3, 80, 6, 2, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q, key, value, dout = (
        draw_normal(one, (b, length, heads, h), jnp.bfloat16)
        for one, length, heads in zip(keys, (t, s, s, t), (n, k, k, n), strict=True)
    )
    if "positions_BT" in options:
        options = options | {"positions_BT": jnp.array(options["positions_BT"])}

    def both(implementation, dtype=jnp.bfloat16):
        def run(*qkv):
            return pallas_kernels.attention(
                *qkv, implementation=implementation, **options
            )

        inputs = [x.astype(dtype) for x in (q, key, value)]
        out, pull = jax.vjp(run, *inputs)
        return [out, *pull(dout.astype(dtype))]

    plain, exact = both("xla"), both("xla", jnp.float32)
    with mosaic.interpret():
        ours = jax.block_until_ready(both("mosaic"))
    for factor, x, y, z in zip((2, 3, 3, 3), ours, plain, exact, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert distance(x, z) <= factor * distance(y, z) + 1e-5


@pytest.mark.parametrize("t", [1, 2])
def test_few_queries_of_all_heads_that_share_keys_are_one_block(t):
    q, k, v = draw(jnp.bfloat16)
    call = functools.partial(pallas_kernels.attention, causal=False)
    assert forward_results(call, q[:, :t], k, v) == [(B, t * N // K, K, H)]


@pytest.mark.parametrize(
    ("t", "s", "num_heads"), [(9, 16, 1), (16, 81, 1), (3, 16, 3), (100, 100, 1)]
)
def test_lengths_that_do_not_compile_are_left_to_plain_jax(t, s, num_heads):
    q = jax.ShapeDtypeStruct((1, t, num_heads, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, s, 1, 64), jnp.bfloat16)
    with traced_for(H200):
        auto = choose_attention(q, k, causal=False)
        assert auto.implementation == "xla"
        assert "multiples of 8" in auto.reason
        with pytest.raises(NotImplementedError, match=r"lengths .* multiples of 8"):
            choose_attention(q, k, causal=False, implementation="mosaic")


@pytest.mark.parametrize(
    ("t", "s", "num_heads"), [(7, 16, 1), (16, 7, 1), (4, 88, 2), (104, 104, 1)]
)
def test_other_lengths_compile_forward_and_backward(t, s, num_heads):
    q = jnp.zeros((1, t, num_heads, 64), jnp.bfloat16)
    k = jnp.zeros((1, s, 1, 64), jnp.bfloat16)

    def total(q, k, v):
        out_BTNH = pallas_kernels.attention(
            q, k, v, causal=False, implementation="mosaic"
        )
        return out_BTNH.astype(jnp.float32).sum()

    assert len(kernel_calls(jax.grad(total, (0, 1, 2)), q, k, k)) >= 3


def test_with_sinks_each_head_has_blocks_of_its_own():
    q, k, v = draw(jnp.bfloat16)
    sinks_N = jnp.zeros(N)
    call = functools.partial(pallas_kernels.attention, causal=False, sinks_N=sinks_N)
    assert forward_results(call, q[:, :1], k, v) == [(B, 1, N, H)]


def kernel_calls(function, *inputs) -> list[str]:
    """Returns the lines of a program that call kernels, for an H200 not in sight."""
    with traced_for(H200):
        traced = jax.jit(function).trace(*inputs)
        lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    return [line for line in lines if "custom_call @mosaic_gpu" in line]


def forward_results(function, *inputs) -> list[tuple[int, ...]]:
    """Returns the shape of what each call of the forward kernel makes."""
    return [
        tuple(int(dim) for dim in line.rpartition("-> (tensor<")[2].split("x")[:4])
        for line in kernel_calls(function, *inputs)
        if "attention_forward" in line
    ]


def forward_kernels(policy) -> int:
    """Counts the forward kernels of a gradient through two remat layers."""

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, k, v):
        return pallas_kernels.attention(x * jnp.bfloat16(2), k, v)

    def total(x, k, v):
        return layer(layer(x, k, v), k, v).astype(jnp.float32).sum()

    return len(forward_results(jax.grad(total), *draw(jnp.bfloat16)))


def test_remat_runs_the_forward_kernel_once_a_layer_if_its_results_are_saved():
    policies = jax.checkpoint_policies
    names = ("attention", "attention_lse")
    assert forward_kernels(policies.save_only_these_names(*names)) == 2
    # What the names are worth: without the second, or both, kernels run again.
    assert forward_kernels(policies.save_only_these_names("attention")) == 4
    assert forward_kernels(policies.nothing_saveable) == 3


Q, KV = (2, 8, 4, 8), (2, 8, 2, 8)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ((Q, (2, 8, 3, 8), (2, 8, 3, 8)), {}, "multiple of K"),
        ((Q, (2, 8, 2, 4), (2, 8, 2, 4)), {}, "B and H must be q's"),
        ((Q, (1, 8, 2, 8), (1, 8, 2, 8)), {}, "B and H must be q's"),
        ((Q, KV, (2, 8, 4, 8)), {}, "must be alike"),
        ((Q[1:], KV, KV), {}, r"must be \[B, T, N, H\]"),
        ((Q, KV[1:], KV[1:]), {}, r"must be \[B, T, N, H\]"),
        (((2, 0, 4, 8), KV, KV), {}, "at least 1"),
        ((Q, (2, 9, 2, 8), (2, 9, 2, 8)), {}, "need positions_BT"),
        (
            (Q, (2, 9, 2, 8), (2, 9, 2, 8)),
            dict(window=3, causal=False),
            "need positions_BT",
        ),
        ((Q, (2, 9, 2, 8), (2, 9, 2, 8)), dict(segments_BT=(2, 8)), "documents need"),
        ((Q, KV, KV), dict(segments_BT=(2, 9)), r"segments_BT \(2, 9\)"),
        ((Q, KV, KV), dict(segments_BT=(1, 8)), r"segments_BT \(1, 8\)"),
        ((Q, KV, KV), dict(positions_BT=(2, 7)), r"positions_BT \(2, 7\)"),
        (
            (Q, KV, KV),
            dict(segments_BT=(2, 8), positions_BT=(2, 8)),
            "leave positions_BT out",
        ),
        ((Q, KV, KV), dict(window=-1), "window=-1"),
        ((Q, KV, KV), dict(window=2.0), "window=2.0"),
        ((Q, KV, KV), dict(window=True), "window=True"),
        ((Q, KV, KV), dict(softcap=0.0), "softcap=0.0"),
        ((Q, KV, KV), dict(softcap=-5), "softcap=-5"),
        ((Q, KV, KV), dict(softcap=float("inf")), "softcap=inf"),
        ((Q, KV, KV), dict(scale=float("nan")), "scale=nan"),
        ((Q, KV, KV), dict(scale=jnp.ones(())), "Python number"),
        ((Q, KV, KV), dict(causal=1), "causal=1"),
        ((Q, KV, KV), dict(sinks_N=jnp.zeros(2)), "for 4 query heads"),
        ((Q, KV, KV), dict(sinks_N=jnp.zeros(4, jnp.int32)), r"int32\[4\]"),
        ((Q, KV, KV), dict(segments_BT=jnp.zeros((2, 8))), "cast it to int32"),
        ((Q, KV, KV), dict(implementation="triton"), "it has cudnn, mosaic, xla"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(shapes, options, words):
    q, k, v = (jnp.zeros(shape) for shape in shapes)
    arrays: dict[str, Any] = {
        name: jnp.zeros(x, jnp.int32) if isinstance(x, tuple) else x
        for name, x in options.items()
    }
    with pytest.raises(ValueError, match=words) as error:
        pallas_kernels.attention(q, k, v, **arrays)
    assert "attention got" in str(error.value)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16", "bfloat16"), ("int32", "int32", "int32")]
)
def test_dtypes_that_do_not_fit_are_refused(dtypes):
    q, k, v = (jnp.zeros(x, d) for x, d in zip((Q, KV, KV), dtypes, strict=True))
    with pytest.raises(ValueError, match="must have the same dtype"):
        pallas_kernels.attention(q, k, v)
