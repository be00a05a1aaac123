# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul: the specification against float64, the kernels against it."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.case import draw_normal
from pallas_kernels.grouped_matmul import (
    choose_grouped_matmul,
    grouped_matmul,
    grouped_matmul_reference,
)
from pallas_kernels.grouped_matmul.cases import cases
from pallas_kernels.grouped_matmul.hopper import groups
from pallas_kernels.grouped_matmul.op import rows_times_rows, rows_times_weights
from pallas_kernels.grouped_matmul.tiles import Tile

T, D, E, F = 200, 128, 4, 64
# Empty groups at every place, all rows in one, rows in none, and edges at, just before
# and just after what a copy (8), a warpgroup (64) and a tile (128) holds.
SIZES = (
    (0, 200, 0, 0),
    (0, 0, 0, 0),
    (100, 0, 70, 5),
    (1, 2, 3, 4),
    (8, 64, 128, 0),
    (63, 65, 7, 65),
)


def draw(shape, dtype, seed):
    return draw_normal(jax.random.key(seed), shape, dtype)


def with_gradients(function):
    """Returns a function of x, w, dout and sizes: the product and its two gradients."""

    def run(x_TD, w_EDF, dout_TF, group_sizes_E):
        out, transpose = jax.vjp(
            lambda x, w: function(x, w, group_sizes_E), x_TD, w_EDF
        )
        return out, *transpose(dout_TF)

    return run


run_mosaic = jax.jit(
    with_gradients(functools.partial(grouped_matmul, implementation="mosaic"))
)
run_xla = jax.jit(
    with_gradients(functools.partial(grouped_matmul, implementation="xla"))
)


def exact(x, w, dout, sizes):
    """Returns the product and its gradients in float64, group by group."""
    x, w, dout = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, dout))
    out = np.zeros((x.shape[0], w.shape[2]))
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows], dx[rows] = x[rows] @ w[e], dout[rows] @ w[e].T
        dw[e] = x[rows].T @ dout[rows]
        start += size
    return out, dx, dw


def error(got, expected) -> float:
    difference = np.asarray(got.astype(jnp.float32), np.float64) - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30))


def assert_as_good_as_xla(got, xla, expected):
    names, factors = ("out", "dx", "dw"), (2, 3, 3)
    for name, factor, a, b, c in zip(names, factors, got, xla, expected, strict=True):
        assert a.dtype == b.dtype
        assert error(a, c) <= factor * error(b, c) + 1e-6, name


def inputs(dtype=jnp.bfloat16, w_dtype=None):
    x, w = draw((T, D), dtype, 0), draw((E, D, F), dtype, 1)
    return x, w.astype(w_dtype or dtype), draw((T, F), dtype, 2)


def fitted(sizes, num_rows) -> tuple[int, ...]:
    """Cuts sizes of groups to those that so many rows can have."""
    ends = np.minimum(np.cumsum([0, *sizes]), num_rows)
    return tuple(int(size) for size in np.diff(ends))


row_tiles = jax.jit(groups.row_tiles, static_argnums=(1, 2))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 300), min_size=6, max_size=6),
    st.sampled_from((1, 200, 1024)),
)
def test_the_tiles_hold_every_row_of_every_group_once(sizes, num_rows):
    sizes = fitted(sizes, num_rows)
    tiles = row_tiles(jnp.array(sizes, jnp.int32), num_rows, 128)
    groups, bases, firsts, ends, (count,) = (np.asarray(a) for a in tiles)
    assert 0 < count <= len(groups)
    owners = np.full(num_rows, -1)
    for group, base, first, end in zip(groups, bases, firsts, ends, strict=True):
        if count:
            assert base % 8 == 0 and 0 <= first < 8 and first < end <= 128
            rows = slice(base + first, base + end)
            assert (owners[rows] == -1).all()
            owners[rows] = group
            count -= 1
    np.testing.assert_array_equal(
        owners, np.repeat([*range(len(sizes) + 1)], [*sizes, num_rows - sum(sizes)])
    )


def test_sizes_beyond_the_rows_there_are_never_lead_out_of_bounds():
    for sizes in ([300, 300], [0, 1000], [2**31 - 1, 0], [-5, 20]):
        tiles = groups.row_tiles(jnp.array(sizes, jnp.int32), 100, 128)
        used = int(tiles.used[0])
        assert (tiles.bases + tiles.ends)[:used].max() <= 100
        assert tiles.bases.min() >= 0
        by_size = groups.groups_by_size(jnp.array(sizes, jnp.int32), 100)
        assert (by_size.bases + by_size.ends).max() <= 100


@pytest.mark.parametrize("sizes", SIZES)
def test_reference_and_xla_are_the_sums_of_float64(sizes):
    with jax.enable_x64(True):
        x, w, dout = (a.astype(jnp.float64) for a in inputs())
        group_sizes = jnp.array(sizes, jnp.int32)
        reference = with_gradients(grouped_matmul_reference)
        for run in (jax.jit(reference), run_xla):
            got = run(x, w, dout, group_sizes)
            for a, b in zip(got, exact(x, w, dout, sizes), strict=True):
                assert a.dtype == jnp.float64
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_are_as_good_as_xla(sizes):
    x, w, dout = inputs(w_dtype=jnp.float32)
    group_sizes = jnp.array(sizes, jnp.int32)
    with mosaic.interpret():
        got = run_mosaic(x, w, dout, group_sizes)
    rounded = w.astype(jnp.bfloat16)
    xla = run_xla(x, w, dout, group_sizes)
    assert_as_good_as_xla(got, xla, exact(x, rounded, dout, sizes))
    assert got[2].dtype == jnp.float32


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(0, 70), min_size=E, max_size=E))
def test_kernels_are_as_good_as_xla_for_any_sizes(sizes):
    test_kernels_are_as_good_as_xla(fitted(sizes, T))


def test_rows_of_no_group_are_zero_and_never_seen():
    sizes = (3, 0, 90, 8)
    group_sizes, used = jnp.array(sizes, jnp.int32), sum(sizes)
    x, w, dout = inputs(w_dtype=jnp.float32)
    poisoned = x.at[used:].set(jnp.nan), w, dout.at[used:].set(jnp.inf)
    with mosaic.interpret():
        got = run_mosaic(*poisoned, group_sizes)
        again = run_mosaic(*poisoned, group_sizes)
    for run in (run_xla, jax.jit(with_gradients(grouped_matmul_reference))):
        for a in run(*poisoned, group_sizes):
            assert jnp.isfinite(a).all()
    expected = exact(x, w.astype(jnp.bfloat16), dout, sizes)
    assert_as_good_as_xla(got, run_xla(x, w, dout, group_sizes), expected)
    for a, b in zip(got, again, strict=True):
        np.testing.assert_array_equal(a, b)  # the same bits
    for a in got[:2]:
        assert (a[used:] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_many_tiles_of_rows_and_columns_in_panels(transposed):
    tile = Tile(columns=64, stages=2, panel=2)
    x, w = draw((264, 64), jnp.float16, 0), draw((3, 64, 192), jnp.float16, 1)
    sizes = (131, 60, 70)
    given = w.swapaxes(1, 2) if transposed else w
    run = functools.partial(rows_times_weights, transposed=transposed)
    with mosaic.interpret():
        got = jax.jit(functools.partial(run, implementation="mosaic", tile=tile))(
            x, given, jnp.array(sizes, jnp.int32)
        )
    xla = run(x, given, jnp.array(sizes, jnp.int32), implementation="xla")
    expected, _, _ = exact(x, w, draw((264, 192), jnp.float16, 2), sizes)
    assert error(got, expected) <= 2 * error(xla, expected) + 1e-6


def test_many_tiles_of_a_weight_gradient():
    tile = Tile(columns=64, stages=2, panel=2)
    x, y = draw((152, 192), jnp.bfloat16, 0), draw((152, 128), jnp.bfloat16, 1)
    sizes = jnp.array((131, 0, 19), jnp.int32)
    run = functools.partial(rows_times_rows, dtype=jnp.dtype(jnp.bfloat16))
    with mosaic.interpret():
        got = jax.jit(functools.partial(run, implementation="mosaic", tile=tile))(
            x, y, sizes
        )
    xla = run(x, y, sizes, implementation="xla")
    _, _, expected = exact(x, jnp.zeros((3, 192, 128)), y, np.asarray(sizes))
    assert got.dtype == jnp.bfloat16
    assert error(got, expected) <= 3 * error(xla, expected) + 1e-6


def test_auto_takes_the_kernel_on_hopper_only():
    x, w, _ = inputs()
    assert choose_grouped_matmul(x, w).implementation == "xla"
    assert "platform cpu" in choose_grouped_matmul(x, w).reason
    with mosaic.interpret():
        assert choose_grouped_matmul(x, w).implementation == "mosaic"
        refused = choose_grouped_matmul(x[:, :72], w[:, :72])
        assert refused.implementation == "xla" and "72 and 64" in refused.reason
        assert "197 rows" in choose_grouped_matmul(x[:197], w).reason
        x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
        assert "float32" in choose_grouped_matmul(x32, w32).reason


BAD = {
    "depth": (((8, 16), "bfloat16"), ((2, 24, 8), "bfloat16"), ((2,), "int32")),
    "rank": (((8, 2, 16), "bfloat16"), ((2, 16, 8), "bfloat16"), ((2,), "int32")),
    "groups": (((8, 16), "bfloat16"), ((2, 16, 8), "bfloat16"), ((3,), "int32")),
    "sizes rank": (((8, 16), "bfloat16"), ((2, 16, 8), "bfloat16"), ((2, 1), "int32")),
    "sizes dtype": (((8, 16), "bfloat16"), ((2, 16, 8), "bfloat16"), ((2,), "float32")),
    "mixed": (((8, 16), "float32"), ((2, 16, 8), "bfloat16"), ((2,), "int32")),
    "integers": (((8, 16), "int8"), ((2, 16, 8), "int8"), ((2,), "int32")),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name):
    arguments = [jnp.zeros(shape, dtype) for shape, dtype in BAD[name]]
    with pytest.raises(ValueError, match=r"grouped_matmul got .*: .*\.$"):
        grouped_matmul(*arguments)


def test_an_implementation_that_cannot_says_which_can():
    x, w, _ = inputs()
    sizes = jnp.array(SIZES[0], jnp.int32)
    with pytest.raises(NotImplementedError, match=r"platform cpu; use xla"):
        grouped_matmul(x, w, sizes, implementation="mosaic")
    with pytest.raises(ValueError, match=r"it has mosaic, xla, and auto"):
        grouped_matmul(x, w, sizes, implementation="cudnn")


def test_cases_are_calls_that_can_be_made():
    for case in cases():
        if case.in_ci:
            out = jax.eval_shape(case.functions["xla"], *case.inputs)
            assert 0 < out.size * 2 < case.num_bytes
            *_, sizes = jax.eval_shape(case.make_inputs, jax.random.key(0))
            assert sizes.shape == case.inputs[-1].shape
