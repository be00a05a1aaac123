# SPDX-License-Identifier: Apache-2.0
"""Quantisation to 8-bit floats: properties of the specification, kernels against it."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.quantize import choose_quantize, dequantize, quantize
from pallas_kernels.quantize.cases import cases
from pallas_kernels.quantize.op import SCALINGS
from pallas_kernels.quantize.reference import expand

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
STATIC = ("scaling", "dtype", "transpose", "power_of_two")
run_xla = jax.jit(
    functools.partial(quantize, implementation="xla"), static_argnames=STATIC
)


def draw(shape, seed=0, dtype=jnp.bfloat16) -> jax.Array:
    """Returns normal numbers whose size differs a lot from block to block."""
    keys = jax.random.split(jax.random.key(seed), 2)
    sizes = jnp.exp(4 * jax.random.normal(keys[0], [-(-n // 32) for n in shape]))
    sizes = jnp.repeat(jnp.repeat(sizes, 32, axis=0), 32, axis=1)
    x = jax.random.normal(keys[1], shape) * sizes[: shape[0], : shape[1]]
    return x.astype(dtype)


def interpreted(x, **options):
    """Runs the kernel in interpret mode, under the detector of races."""
    run = jax.jit(functools.partial(quantize, implementation="mosaic", **options))
    with mosaic.interpret():
        return run(x)


@every_scaling
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_error_is_at_most_half_a_unit_in_the_last_place(
    scaling, dtype, power_of_two
):
    x = draw((130, 200))
    got = run_xla(x, scaling=scaling, dtype=dtype, power_of_two=power_of_two)
    values = np.asarray(got.values.astype(jnp.float32))
    scales = np.asarray(expand(got.scales, x.shape), np.float64)
    info = jnp.finfo(dtype)
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    error = np.abs(np.asarray(dequantize(got.values, got.scales), np.float64) - x64)
    # Of normal values, relative to them; of subnormal ones, to the least.
    bound = np.maximum(
        np.abs(x64) * float(info.eps) / 2,
        scales * float(info.smallest_subnormal) / 2,
    )
    assert (error <= bound * (1 + 1e-5)).all()
    assert np.abs(values).max() <= float(info.max)
    assert float(got.amax) == np.abs(x64).max()
    if power_of_two:
        assert (np.frexp(scales)[0] == 0.5).all()
        # The next smaller power of two would saturate.
        assert (scales / 2 * float(info.max) < float(got.amax)).all()
    else:
        assert np.abs(values).max() == float(info.max)


@every_scaling
def test_quantising_again_changes_nothing(scaling):
    options = dict(scaling=scaling, dtype=E4M3, power_of_two=True)
    once = run_xla(draw((130, 200)), **options)
    again = run_xla(dequantize(once.values, once.scales), **options)
    np.testing.assert_array_equal(
        dequantize(again.values, again.scales), dequantize(once.values, once.scales)
    )


@every_scaling
def test_the_transpose_is_that_of_the_transposed(scaling):
    x = draw((130, 200))
    got = run_xla(x, scaling=scaling, transpose=True)
    expected = run_xla(x.T, scaling=scaling)
    np.testing.assert_array_equal(got.transposed_values, expected.values)
    np.testing.assert_array_equal(got.transposed_scales, expected.scales)


@every_scaling
def test_zeros_and_numbers_of_no_size_have_scale_one(scaling):
    for x in (jnp.zeros((128, 128)), jnp.full((128, 128), 1e-38)):
        got = run_xla(x, scaling=scaling)
        assert (got.scales == 1).all() and (got.values == 0).all()


@every_scaling
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_stays_so_and_in_its_block(scaling, bad):
    x = draw((256, 256)).at[3, 5].set(bad)
    got = run_xla(x, scaling=scaling)
    wide = np.asarray(jnp.isfinite(dequantize(got.values, got.scales)))
    block = {
        "tensor": np.s_[:, :],
        "rows_1x128": np.s_[3, :128],
        "blocks_128x128": np.s_[:128, :128],
    }[scaling]
    expected = np.ones((256, 256), bool)
    expected[block] = False
    np.testing.assert_array_equal(wide, expected)


def test_a_scale_of_earlier_steps_saturates():
    x = jnp.array([[1.0, -3.0, jnp.inf, jnp.nan]])
    got = run_xla(x, scaling="tensor", amax=jnp.float32(2))
    np.testing.assert_allclose(
        dequantize(got.values, got.scales), [[1, -2, 2, jnp.nan]], rtol=1e-6
    )


@every_scaling
@pytest.mark.parametrize(
    "dtype,transpose,power_of_two",
    [(E4M3, True, False), (E5M2, False, False), (E4M3, True, True)],
)
def test_kernels_do_what_the_specification_says(
    scaling, dtype, transpose, power_of_two
):
    options = dict(
        scaling=scaling, dtype=dtype, transpose=transpose, power_of_two=power_of_two
    )
    x = draw((256, 256), dtype=jnp.float16 if dtype == E5M2 else jnp.bfloat16)
    x = x.at[:128, :128].set(0)
    got, expected = interpreted(x, **options), run_xla(x, **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


@every_scaling
def test_kernels_take_rows_that_fill_no_block_and_what_is_not_finite(scaling):
    x = draw((136, 128)).at[3, 5].set(jnp.nan).at[130, 0].set(-jnp.inf)
    got, expected = interpreted(x, scaling=scaling), run_xla(x, scaling=scaling)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_a_kernel_takes_a_scale_of_earlier_steps():
    x = draw((128, 128)).at[0, 0].set(jnp.inf).at[0, 1].set(jnp.nan)
    amax = jnp.float32(0.5)
    got = interpreted(x, scaling="tensor", amax=amax)
    expected = run_xla(x, scaling="tensor", amax=amax)
    np.testing.assert_array_equal(
        got.values.astype(jnp.float32), expected.values.astype(jnp.float32)
    )


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.sampled_from(SCALINGS), st.integers(0, 2**31 - 1))
def test_any_numbers_keep_within_the_bound(scaling, seed):
    x = draw((128, 256), seed)
    got = run_xla(x, scaling=scaling)
    error = jnp.abs(dequantize(got.values, got.scales) - x.astype(jnp.float32))
    # Half a unit in the last place of the largest value, 448: 16 of 448.
    bound = expand(got.scales, x.shape) * 16
    assert (error <= bound * (1 + 1e-5)).all()


def test_auto_takes_the_kernel_on_hopper_only():
    x = draw((128, 128))
    assert choose_quantize(x).implementation == "xla"
    with mosaic.interpret():
        assert choose_quantize(x).implementation == "mosaic"
        for refused, why in (
            (x.astype(jnp.float32), "dtype float32"),
            (x[:, :64], "width 64"),
            (x[:100], "100 rows"),
        ):
            choice = choose_quantize(refused)
            assert choice.implementation == "xla" and why in choice.reason
        assert "multiples of 128" in choose_quantize(x[:64], transpose=True).reason


BAD = {
    "rank": (dict(shape=(4,)), dict(scaling="tensor")),
    "empty": (dict(shape=(0, 4)), dict(scaling="tensor")),
    "integers": (dict(shape=(4, 4), dtype="int8"), dict(scaling="tensor")),
    "scaling": (dict(shape=(4, 4)), dict(scaling="1x128")),
    "dtype": (dict(shape=(4, 4)), dict(scaling="tensor", dtype="bfloat16")),
    "amax": (dict(shape=(4, 4)), dict(scaling="rows_1x128", amax=jnp.float32(1))),
    "vector": (dict(shape=(4, 4)), dict(scaling="tensor", amax=jnp.ones((2,)))),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name):
    array, options = BAD[name]
    with pytest.raises(ValueError, match=r"quantize got .*: .*\.$"):
        quantize(jnp.zeros(**array), **options)


def test_an_implementation_that_cannot_says_which_can():
    with pytest.raises(NotImplementedError, match=r"platform cpu; use xla"):
        quantize(draw((128, 128)), scaling="tensor", implementation="mosaic")
    with pytest.raises(ValueError, match=r"it has mosaic, xla, and auto"):
        quantize(draw((128, 128)), scaling="tensor", implementation="cudnn")


def test_cases_are_calls_that_can_be_made():
    for case in cases():
        jax.eval_shape(case.functions["xla"], *case.inputs)
        assert case.num_bytes > 0
