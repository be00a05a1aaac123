# SPDX-License-Identifier: Apache-2.0
"""The norms' kernels, interpreted, with race detection, against float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import mosaic
from pallas_kernels.norm import op as norm_op
from pallas_kernels.norm.tiles import find_tile, share
from pallas_kernels.target import H200, INTERPRETED, traced_for

EPS = 1e-5
# Where plain JAX happens to make no error at all, a rounding of float32.
LEAST_ERROR = 1e-6
# By bytes of an element: widths whose rows have blocks of their own in a forward pass.
DIRECT = {2: (5120, 8192, 12288, 16384), 4: (5120, 6656, 8192, 12288, 16384)}


def draw(shape, dtype, seed, size=1.0) -> jax.Array:
    values = size * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def exact(kind, x, scale, bias, residual, dy, ds, offset):
    """Returns the norm, the sum and all gradients in float64, of a rounded sum."""
    if residual is not None:
        x = x + residual
    x, scale, bias, dy, ds = (
        np.asarray(a, np.float64) for a in (x, scale, bias, dy, ds)
    )
    is_layer = kind == "layer"
    h = x - x.mean(-1, keepdims=True) if is_layer else x
    rstd = 1 / np.sqrt((h**2).mean(-1, keepdims=True) + EPS)
    n, w = h * rstd, scale + (0 if is_layer else offset)
    g = dy * w
    slope = g.mean(-1, keepdims=True) if is_layer else 0
    dx = rstd * (g - slope - n * (g * n).mean(-1, keepdims=True))
    over = tuple(range(x.ndim - 1))
    outputs = [n * w + (bias if is_layer else 0), x]
    gradients = [dx + (0 if residual is None else ds), (dy * n).sum(over)]
    return outputs, gradients + ([dy.sum(over)] if is_layer else [])


def run(kind, implementation, x, scale, bias, residual, dy, ds, offset):
    """Returns [norm, sum] and [dx, dscale, dbias] of one implementation."""

    def function(x, scale, bias):
        options: Any = dict(eps=EPS, residual=residual, implementation=implementation)
        if kind == "layer":
            return pallas_kernels.layer_norm(x, scale, bias, **options)
        return pallas_kernels.rms_norm(x, scale, offset=offset, **options)

    def both(x, scale, bias):
        outputs, pull = jax.vjp(function, x, scale, bias)
        return outputs, pull(dy if residual is None else (dy, ds))

    outputs, gradients = jax.jit(both)(x, scale, bias)
    outputs = [outputs, x] if residual is None else list(outputs)
    return outputs, list(gradients[: 2 + (kind == "layer")])


def error(x, expected) -> float:
    difference = np.linalg.norm(np.asarray(x, np.float64) - expected)
    return float(difference / max(np.linalg.norm(expected), 1e-30))


def check(kind, shape, dtype, *, residual, offset=0.0, size=1.0, scale_dtype="float32"):
    x, r, dy, ds = (draw(shape, dtype, seed, size) for seed in range(4))
    dy, ds = dy / size, ds / size
    scale, bias = (draw(shape[-1:], scale_dtype, seed) for seed in (5, 6))
    arguments = (x, scale, bias, r if residual else None, dy, ds, offset)
    with mosaic.interpret():
        got = run(kind, "mosaic", *arguments)
    plain, expected = run(kind, "xla", *arguments), exact(kind, *arguments)
    for factor, ours, theirs, truth in zip((2, 3), got, plain, expected, strict=True):
        for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), i
            assert error(a, c) <= factor * error(b, c) + LEAST_ERROR, (factor, i)
    return got


@pytest.mark.parametrize(
    "kind, shape, dtype, residual",
    [
        ("rms", (3, 5, 128), "bfloat16", False),  # heads; rows no multiple of a step
        ("layer", (37, 64), "bfloat16", True),
        ("rms", (1, 80), "float16", True),  # one row, a head width that fits badly
        ("rms", (16, 96), "float32", False),
        ("layer", (9, 512), "float32", True),  # pieces of narrow rows
        ("rms", (64,), "float32", True),  # no leading dim
        ("rms", (7, 1000), "bfloat16", True),  # the last piece sticks out of the row
        ("layer", (7, 1000), "float16", True),
        ("layer", (3, 2561), "bfloat16", True),  # bytes of a row no multiple of 16
        ("rms", (5, 131), "float32", False),
        ("layer", (3, 4352), "bfloat16", True),  # two warpgroups share a row
        ("rms", (3, 12800), "bfloat16", True),  # four do
        ("layer", (2, 16384), "float16", False),  # no room for the bias's gradient
        ("rms", (9, 2048), "bfloat16", True),
        ("rms", (3, 5120), "bfloat16", True),  # a block a row, straight through
        ("layer", (2, 8192), "float16", True),
    ],
)
def test_kernels_are_as_exact_as_plain_jax(kind, shape, dtype, residual):
    check(kind, shape, dtype, residual=residual)


@pytest.mark.parametrize("kind, parts", [("rms", 2), ("layer", 8)])
def test_shared_rows_that_go_past_shared_memory_in_turns(kind, parts, monkeypatch):
    cut = share(4096, parts, widest=8, most=8)
    assert cut is not None
    tile = dataclasses.replace(cut, staged=False, slots=1, blocks_per_core=1)
    monkeypatch.setattr(norm_op, "find_tile", lambda *_: tile)
    check(kind, (3, 4096), "bfloat16", residual=True)  # two turns of a block


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["rms", "layer"]),
    rows=st.integers(1, 40),
    width=st.one_of(st.integers(8, 40).map(lambda n: 8 * n), st.integers(128, 700)),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_any_rows_of_any_width(kind, rows, width, dtype, residual, offset):
    check(kind, (rows, width), dtype, residual=residual, offset=offset)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_values(kind, size):
    check(kind, (5, 128), "bfloat16", residual=True, size=size)


def test_a_scale_of_the_dtype_of_x_gets_a_gradient_of_its_dtype():
    _, (_, dscale) = check(
        "rms", (9, 128), "bfloat16", residual=True, scale_dtype="bfloat16"
    )
    assert dscale.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind, width", [("rms", 131), ("layer", 128)])
def test_rows_of_zeros_stay_zero_with_finite_gradients(kind, width):
    zeros, dy = jnp.zeros((3, width), jnp.bfloat16), draw((3, width), "bfloat16", 0)
    arguments = zeros, jnp.ones(width), jnp.zeros(width), zeros, dy, zeros, 0.0
    with mosaic.interpret():
        (y, s), gradients = run(kind, "mosaic", *arguments)
    assert not np.any(y) and not np.any(s)
    assert all(np.all(np.isfinite(g.astype(jnp.float32))) for g in gradients)


def test_the_norm_is_of_the_rounded_sum_and_the_sum_is_that_of_plain_jax():
    x, residual = draw((9, 128), "bfloat16", 0), draw((9, 128), "bfloat16", 1, 100.0)
    scale = draw((128,), "float32", 2)

    def fused(x, residual):
        return pallas_kernels.rms_norm(
            x, scale, eps=EPS, residual=residual, implementation="mosaic"
        )

    def alone(x):
        return pallas_kernels.rms_norm(x, scale, eps=EPS, implementation="mosaic")

    with mosaic.interpret():
        y, s = jax.jit(fused)(x, residual)
        y_of_s = jax.jit(alone)(s)
    np.testing.assert_array_equal(s, x + residual)
    np.testing.assert_array_equal(y, y_of_s)


def test_the_same_bits_twice():
    arguments = (
        draw((37, 128), "bfloat16", 0),
        draw((128,), "float32", 1),
        draw((128,), "float32", 2),
        draw((37, 128), "bfloat16", 3),
        draw((37, 128), "bfloat16", 4),
        draw((37, 128), "bfloat16", 5),
        0.0,
    )
    with mosaic.interpret():
        first, second = (run("layer", "mosaic", *arguments) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_gradient_of_the_sum_alone_passes_through():
    x = draw((5, 128), "float32", 0)

    def total(x):
        _, s = pallas_kernels.rms_norm(
            x, jnp.ones(128), eps=EPS, residual=x, implementation="mosaic"
        )
        return (s * s).sum()

    with mosaic.interpret():
        gradient = jax.jit(jax.grad(total))(x)
    np.testing.assert_allclose(gradient, 8 * x, rtol=1e-6)


def kernels_of_a_step(policy) -> dict[str, int]:
    """Returns how often each kernel runs in a loss with gradients, on an H200."""
    x, scale = jnp.ones((8, 128), jnp.bfloat16), jnp.ones(128)

    def block(x):
        y, s = pallas_kernels.rms_norm(jnp.sin(x), scale, eps=EPS, residual=x)
        return jnp.sin(y) + s

    def loss(x):
        return jax.checkpoint(block, policy=policy)(x).astype(jnp.float32).sum()

    with traced_for(H200):
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "mosaic_gpu" in line]
    names = ("norm_forward", "norm_backward")
    return {name: sum(name in call for call in calls) for name in names}


def test_a_policy_that_saves_both_outputs_runs_the_forward_kernel_once():
    policies = jax.checkpoint_policies
    saved = kernels_of_a_step(policies.save_only_these_names("norm", "norm_sum"))
    assert saved == {"norm_forward": 1, "norm_backward": 1}
    nothing = kernels_of_a_step(policies.nothing_saveable)
    assert nothing == {"norm_forward": 2, "norm_backward": 1}


@pytest.mark.parametrize("itemsize", [2, 4])
def test_widths_of_models_have_tiles_that_fit(itemsize):
    widths = (64, 80, 96, 128, 256, 768, 1000, 1152, 2048, 2561, 2880, 5120, 8192)
    for width in (*widths, 6656, 11008, 12288, 16384):
        for kernel, most in (("norm_forward", 2), ("norm_backward", 3)):
            tile = find_tile(INTERPRETED, kernel, width, itemsize, most)
            assert tile is not None, width
            held = tile.num_pieces * tile.piece * tile.parts
            assert held * (tile.lines if tile.is_shared else 1) >= width
            assert tile.columns <= 48
            step_bytes = tile.rows * width * itemsize * most
            if tile.staged:
                held = tile.slots * tile.blocks_per_core * step_bytes
                assert 0 < held <= 224 * 1024
            # Blocks of a backward pass carry totals: there cannot be one for each step.
            one_each = not tile.blocks_per_core
            assert one_each == (
                kernel == "norm_forward" and width in DIRECT[itemsize]
            ), width
