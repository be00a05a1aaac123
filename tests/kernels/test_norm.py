# SPDX-License-Identifier: Apache-2.0
"""Norms against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.norm import choose_norm
from pallas_kernels.target import H200, Target, traced_for

rms_norm = jax.jit(pallas_kernels.rms_norm, static_argnames=("eps", "offset"))
layer_norm = jax.jit(pallas_kernels.layer_norm, static_argnames="eps")

D = 64
EPS32 = float(np.finfo(np.float32).eps)
EPS16 = float(jnp.finfo(jnp.bfloat16).eps)


def draw(shape, scale=1.0, shift=0.0, seed=0) -> np.ndarray:
    return shift + scale * np.random.default_rng(seed).normal(size=shape)


def exact_rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def exact_layer(x, scale, bias, eps):
    h = x - x.mean(-1, keepdims=True)
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + eps) * scale + bias


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, 4, D)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norms_are_those_of_float64(shape, size):
    x, scale, bias = draw(shape, size), draw((D,), seed=1), draw((D,), seed=2)
    x32, scale32, bias32 = (jnp.asarray(a, jnp.float32) for a in (x, scale, bias))
    x, scale, bias = (np.asarray(a, np.float64) for a in (x32, scale32, bias32))
    # A handful of roundings, of values of at most sqrt(D) times a scale of about 3.
    tolerance: Any = dict(rtol=16 * EPS32, atol=8 * EPS32)
    got = rms_norm(x32, scale32, eps=1e-6)
    np.testing.assert_allclose(got, exact_rms(x, scale, 1e-6), **tolerance)
    got = layer_norm(x32, scale32, bias32, eps=1e-6)
    np.testing.assert_allclose(got, exact_layer(x, scale, bias, 1e-6), **tolerance)


def test_layer_norm_takes_out_a_large_mean_without_losing_the_rest():
    x32 = jnp.asarray(draw((4, D), shift=1000.0), jnp.float32)
    one, zero = jnp.ones(D), jnp.zeros(D)
    expected = exact_layer(np.asarray(x32, np.float64), 1.0, 0.0, 1e-6)
    got = layer_norm(x32, one, zero, eps=1e-6)
    # The mean of numbers near 1000 is rounded to eps * 1000.
    np.testing.assert_allclose(got, expected, atol=2 * 1000 * EPS32, rtol=8 * EPS32)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bfloat16_is_rounded_once_at_the_end(norm):
    x = jnp.asarray(draw((8, D), 3.0), jnp.bfloat16)
    scale, bias = jnp.asarray(draw((D,)), jnp.float32), jnp.ones(D)
    x64, scale64 = np.asarray(x.astype(jnp.float32), np.float64), np.asarray(scale)
    if norm == "rms":
        got, exact = rms_norm(x, scale, eps=1e-5), exact_rms(x64, scale64, 1e-5)
    else:
        got = layer_norm(x, scale, bias, eps=1e-5)
        exact = exact_layer(x64, scale64, 1.0, 1e-5)
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last place, and float32's own error where that is a tie.
    bound = EPS16 / 2 + 16 * EPS32
    np.testing.assert_allclose(
        got.astype(jnp.float32), exact, rtol=bound, atol=16 * EPS32
    )


def test_zeros_stay_zero_with_finite_gradients():
    def total(x, scale, bias):
        y = rms_norm(x, scale, eps=1e-6) + layer_norm(x, scale, bias, eps=1e-6)
        return (y * y).sum(), y

    x, scale, bias = jnp.zeros((2, D)), jnp.ones(D), jnp.zeros(D)
    gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    gradients, y = jax.jit(gradient)(x, scale, bias)
    assert not np.any(y)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_a_norm_does_not_see_the_size_of_its_input():
    x, scale = jnp.asarray(draw((4, D)), jnp.float32), jnp.ones(D)
    # Powers of two scale without rounding; eps of 0 leaves nothing else.
    got, doubled = rms_norm(x, scale, eps=0.0), rms_norm(64 * x, scale, eps=0.0)
    np.testing.assert_allclose(doubled, got, rtol=2 * EPS32, atol=0)


def test_gradients_are_the_slopes_of_float64():
    x, scale, bias = draw((3, D)), draw((D,), seed=1), draw((D,), seed=2)
    weight, direction = draw((3, D), seed=3), draw((3, D), seed=4)

    def as32(x):
        return jnp.asarray(x, jnp.float32)

    def loss(x):
        y = layer_norm(x, as32(scale), as32(bias), eps=1e-5)
        y = y + rms_norm(x, as32(scale), eps=1e-5)
        return (y * as32(weight)).sum()

    def exact(step):
        moved = x + step * direction
        y = exact_layer(moved, scale, bias, 1e-5) + exact_rms(moved, scale, 1e-5)
        return (y * weight).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(as32(x)), np.float64)
    slope = (exact(1e-5) - exact(-1e-5)) / 2e-5
    size = np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert (gradient * direction).sum() == pytest.approx(slope, abs=16 * EPS32 * size)


def test_offset_one_is_a_scale_kept_as_its_distance_from_one():
    x, distance = jnp.asarray(draw((3, D)), jnp.float32), jnp.asarray(draw((D,)), "f4")
    got = rms_norm(x, distance, eps=1e-6, offset=1.0)
    np.testing.assert_array_equal(got, rms_norm(x, 1 + distance, eps=1e-6))


def test_with_a_residual_the_norm_is_that_of_the_sum_and_both_come_out():
    x, r = (jnp.asarray(draw((3, D), seed=seed), jnp.float32) for seed in (1, 2))
    scale, bias = jnp.ones(D), jnp.ones(D)
    y, s = rms_norm(x, scale, eps=1e-6, residual=r)
    np.testing.assert_array_equal(s, x + r)
    np.testing.assert_allclose(y, rms_norm(x + r, scale, eps=1e-6), rtol=4 * EPS32)
    y, s = layer_norm(x, scale, bias, eps=1e-6, residual=r)
    np.testing.assert_array_equal(s, x + r)
    expected = layer_norm(x + r, scale, bias, eps=1e-6)
    np.testing.assert_allclose(y, expected, rtol=4 * EPS32, atol=8 * EPS32)


X = jnp.ones((2, D), jnp.bfloat16)
ONE = jnp.ones(D)


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        ((jnp.float32(1), ONE), {}, "last dim"),
        ((X.astype(jnp.int32), ONE), {}, "floating point"),
        ((X, jnp.ones(D + 1)), {}, r"scale \(65,\)"),
        ((X, jnp.ones((1, D))), {}, r"scale \(1, 64\)"),
        ((X, ONE.astype(jnp.float16)), {}, "scale of float16"),
        ((X, ONE), {"residual": X[:1]}, "residual"),
        ((X, ONE), {"residual": X.astype(jnp.float32)}, "both must be alike"),
        ((X, ONE), {"eps": -1.0}, "eps=-1.0"),
        ((X, ONE), {"eps": float("nan")}, "eps=nan"),
        ((X, ONE), {"implementation": "triton"}, "it has mosaic, xla, and auto"),
        ((X, ONE), {"implementation": "cudnn"}, "it has mosaic, xla, and auto"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        pallas_kernels.rms_norm(*arguments, **({"eps": 1e-6} | options))


def test_layer_norm_refuses_a_bias_of_another_width():
    with pytest.raises(ValueError, match=r"layer_norm got bias \(65,\)"):
        pallas_kernels.layer_norm(X, ONE, jnp.ones(D + 1), eps=1e-6)


@pytest.mark.parametrize(
    "kind, shape, dtype, says",
    [
        ("NVIDIA H200", (4, 128), "float64", "dtype float64"),
        ("NVIDIA H200", (4, 65), "bfloat16", "width 65"),
        ("NVIDIA H200", (4, 16383), "bfloat16", "width 16383"),
        ("NVIDIA H200", (0, 128), "bfloat16", "empty arrays"),
        ("NVIDIA A100", (4, 128), "bfloat16", "Hopper only"),
        ("cpu", (4, 128), "bfloat16", "platform cpu"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_and_auto_takes_plain_jax(
    kind, shape, dtype, says
):
    platform = "gpu" if "NVIDIA" in kind else "cpu"
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    with traced_for(Target(platform, kind, 132)):
        with pytest.raises(NotImplementedError, match=says):
            choose_norm(x, implementation="mosaic")
        chosen = choose_norm(x)
        assert chosen.implementation == "xla" and says in chosen.reason


def test_auto_takes_the_kernels_on_a_hopper_gpu():
    with traced_for(H200):
        for width in (64, 128, 1000, 4096, 16384):
            x = jax.ShapeDtypeStruct((4, width), jnp.bfloat16)
            assert choose_norm(x, residual=x).implementation == "mosaic"


def test_auto_leaves_to_plain_jax_what_it_does_faster():
    with traced_for(H200):
        x = jax.ShapeDtypeStruct((4, 2561), jnp.bfloat16)
        chosen = choose_norm(x)
        assert chosen.implementation == "xla"
        assert "plain JAX is faster at width 2561" in chosen.reason
        assert choose_norm(x, implementation="mosaic").implementation == "mosaic"
