# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy kernels in interpret mode, with races detected, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.cross_entropy import (
    Terms,
    choose_cross_entropy,
    linear_cross_entropy,
)
from pallas_kernels.cross_entropy.hopper import chunked
from pallas_kernels.cross_entropy.hopper.kernels import (
    MARGIN,
    exponentials,
    make_gradient,
)
from pallas_kernels.cross_entropy.tiles import Tile, fit, rows_of_logits
from pallas_kernels.target import H200, Target, traced_for

T, D, V = 7, 16, 1048  # V is a step and a rest of three vectors
EPS = float(np.finfo(np.float32).eps)
BF16_EPS = float(jnp.finfo(jnp.bfloat16).eps)


def draw(num_words=V, scale=1.0, letters="DV", masked=slice(None, None, 3)):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16)
    w = jnp.asarray(scale / D**0.5 * rng.normal(size=(D, num_words)), jnp.bfloat16)
    targets = rng.integers(0, num_words, T).astype(np.int32)
    targets[masked] = -1
    return x, (w if letters == "DV" else w.T), jnp.asarray(targets)


def wide(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def exact(x, w, targets, *, letters="DV", z_loss=0.0, softcap=None) -> Any:
    """nll, objective, dx and dw in float64, and the largest logsumexp."""
    x, w, targets = wide(x), wide(w if letters == "DV" else w.T), np.asarray(targets)
    raw = x @ w
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = logits.max(-1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    counts = (targets >= 0)[:, None]
    hot = np.arange(w.shape[1]) == targets[:, None]
    nll = np.where(counts, lse - (hot * logits).sum(-1, keepdims=True), 0).sum()
    penalty = z_loss * np.where(counts, lse**2, 0).sum()
    dlogits = np.exp(logits - lse) * (1 + 2 * z_loss * lse) - hot
    dlogits *= 1 if softcap is None else 1 - np.tanh(raw / softcap) ** 2
    dlogits = np.where(counts, dlogits, 0)
    dx, dw = dlogits @ w.T, x.T @ dlogits
    sums: Any = (nll, nll + penalty, dx, dw if letters == "DV" else dw.T)
    return Terms(*sums), np.abs(lse).max()


def run(x, w, targets, implementation="mosaic", **options) -> Any:
    """Runs an implementation; options as for the operation, most have a default."""
    defaults = dict(letters="DV", z_loss=0.0, softcap=None, chunk_tokens=4)
    options = defaults | dict(with_gradients=True) | options
    operation: Any = functools.partial(
        linear_cross_entropy, implementation=implementation, **options
    )
    if implementation == "xla":
        return jax.jit(operation)(x, w, targets)
    with mosaic.interpret():
        return jax.block_until_ready(jax.jit(operation)(x, w, targets))


def error(got, expected) -> float:
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(wide(got) - expected) / max(float(size), 1e-30))


CASES: list[dict[str, Any]] = [
    dict(),
    dict(letters="VD", z_loss=0.1, softcap=2.0),
    dict(num_words=1024, chunk_tokens=T),  # one step, and no rest
    dict(num_words=4104, scale=3.0, z_loss=1e-3),  # a step of all loads, and a rest
    dict(scale=1e4),
    dict(scale=1e4, softcap=30.0, z_loss=1e-3),
    dict(scale=0.0),  # all logits alike
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_at_most_twice_and_three_times_those_of_the_reference(case):
    drawn = {k: v for k, v in case.items() if k in ("num_words", "scale", "letters")}
    options = {k: v for k, v in case.items() if k not in ("num_words", "scale")}
    inputs = draw(**drawn)
    told = {k: v for k, v in options.items() if k != "chunk_tokens"}
    expected, lse = exact(*inputs, **told)
    got, reference = run(*inputs, **options), run(*inputs, "xla", **options)
    for i in (0, 1):  # of float32 sums of T logits and logsumexps
        least = 4 * EPS * T * lse / max(abs(expected[i]), 1e-30)
        assert error(got[i], expected[i]) <= (
            2 * error(reference[i], expected[i]) + least
        )
    for i in (2, 3):
        assert error(got[i], expected[i]) <= (
            3 * error(reference[i], expected[i]) + EPS * D
        )


def test_a_row_whose_largest_logits_come_late_is_done_again():
    x, w, targets = draw(num_words=3 * 1024)
    late = jnp.where(jnp.arange(3 * 1024) >= 2800, 60.0, 0.0).astype(jnp.bfloat16)
    x, w = x.at[:, 0].set(1), w.at[0].set(late)
    expected, _ = exact(x, w, targets)
    assert 60 > MARGIN
    got, reference = run(x, w, targets), run(x, w, targets, "xla")
    assert float(got.nll) == pytest.approx(expected.nll, rel=1e-5)
    for i in (2, 3):
        assert error(got[i], expected[i]) <= 3 * error(reference[i], expected[i]) + EPS


def test_a_batch_without_targets_is_zero():
    x, w, targets = draw()
    for value in run(x, w, jnp.full_like(targets, -1), z_loss=0.1):
        assert not np.any(wide(value))


def test_without_gradients_the_loss_is_the_same_and_none_are_made():
    inputs = draw()
    terms = run(*inputs, with_gradients=False, z_loss=0.1)
    assert terms.dx_TD is None and terms.dw is None
    whole = run(*inputs, z_loss=0.1)
    assert (terms.nll, terms.objective) == (whole.nll, whole.objective)


def test_two_runs_give_the_same_bits():
    inputs = draw()
    for a, b in zip(run(*inputs), run(*inputs), strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10_000])
def test_the_size_of_a_chunk_does_not_matter(chunk_tokens):
    inputs = draw()
    whole, parts = run(*inputs), run(*inputs, chunk_tokens=chunk_tokens)
    assert float(parts.nll) == pytest.approx(float(whole.nll), rel=8 * EPS)
    # bfloat16 of a row is the same in any chunk: its sum of D products is not.
    dx, dw = wide(whole.dx_TD), wide(whole.dw)
    np.testing.assert_allclose(wide(parts.dx_TD), dx, atol=4 * BF16_EPS)
    np.testing.assert_allclose(wide(parts.dw), dw, atol=64 * EPS)


def plain_exponentials(logits_TV, out, start, *, softcap, tile):
    """What `exponentials` says, with the largest logit as reference."""
    del tile
    slope_TV = jnp.ones_like(logits_TV)
    if softcap is not None:
        squashed_TV = jnp.tanh(logits_TV / softcap)
        logits_TV, slope_TV = softcap * squashed_TV, 1 - squashed_TV**2
    reference_T = logits_TV.max(-1)
    e_TV = jnp.exp(logits_TV - reference_T[:, None])
    if out is not None:
        out[pl.ds(start[0], len(e_TV))] = (e_TV * slope_TV).astype(out.dtype)
    return reference_T, e_TV.sum(-1)


def plain_gradient(e, weight_T, words_T, values_T, *, tile):
    """What `make_gradient` says."""
    del tile
    hit_TV = jnp.arange(e.shape[1], dtype=jnp.int32)[None] == words_T[:, None]
    scaled_TV = e[...].astype(jnp.float32) * weight_T[:, None]
    e[...] = jnp.where(hit_TV, values_T[:, None], scaled_TV).astype(e.dtype)


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("num_words", [1024, 1032, 5120, 9 * 1024 - 8])
def test_the_kernels_do_what_they_say(num_words, vector):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(4 * rng.normal(size=(2, num_words)), jnp.float32)
    tile = fit(Tile(vector=vector, loads=3), num_words)
    words = jnp.array([5, -1, num_words - 1, num_words], jnp.int32)
    weights = jnp.array([2.0, 0.0, 0.5, 1.0], jnp.float32)

    def both(exponentials, make_gradient, logits):
        e = jax.new_ref(jnp.ones((4, num_words), jnp.bfloat16))
        start = jnp.array([1], jnp.int32)
        stats = exponentials(logits, e, start, softcap=6.0, tile=tile)
        first = e[...]
        make_gradient(e, weights, words, weights + 7, tile=tile)
        return *stats, first, e[...]

    with mosaic.interpret():
        kernels = functools.partial(both, exponentials, make_gradient)
        reference, total, e, gradient = jax.block_until_ready(jax.jit(kernels)(logits))
    plain = functools.partial(both, plain_exponentials, plain_gradient)
    top, plain_total, plain_e, plain_end = jax.jit(plain)(logits)
    shift = np.exp(wide(top) - wide(reference))
    np.testing.assert_allclose(total, shift * wide(plain_total), rtol=1e-5)
    shift = np.array([1, *shift, 1])[:, None]
    np.testing.assert_allclose(wide(e), shift * wide(plain_e), rtol=2 * BF16_EPS)
    hit = np.arange(num_words) == np.asarray(words)[:, None]
    scaled = np.where(hit, 1.0, shift) * wide(plain_end)
    np.testing.assert_allclose(wide(gradient), scaled, rtol=3 * BF16_EPS)


@pytest.mark.parametrize("axes", [("tensor",), ("data", "tensor")])
@pytest.mark.parametrize("options", [dict(z_loss=0.1), dict(letters="VD", softcap=2.0)])
def test_a_vocabulary_cut_over_devices_gives_the_same(axes, options, monkeypatch):
    # Interpret mode takes simulated devices for one and sees races between them: here,
    # what is around the kernels runs on them, with what the test above holds equal.
    monkeypatch.setattr(chunked, "exponentials", plain_exponentials)
    monkeypatch.setattr(chunked, "make_gradient", plain_gradient)
    shape = (2, 4) if len(axes) == 2 else (8,)
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(shape, axes, axis_types=kinds)
    letters = options.get("letters", "DV")
    inputs = draw(num_words=8 * 1024, letters=letters)
    cut = jax.P(*(axes if letter == "V" else None for letter in letters))
    outs: Any = (jax.P(), jax.P(), jax.P(), cut)
    defaults: dict[str, Any] = dict(letters="DV", z_loss=0.0, softcap=None)
    block: Any = functools.partial(
        chunked.chunked_cross_entropy,
        **defaults | options,
        chunk_tokens=4,
        vocab_axes=axes,
        with_gradients=True,
    )
    parts = jax.jit(
        jax.shard_map(
            block,
            mesh=mesh,
            in_specs=(jax.P(), cut, jax.P()),
            out_specs=Terms(*outs),
            check_vma=False,
        )
    )(*inputs)
    expected, lse = exact(*inputs, **options)
    reference = run(*inputs, "xla", **options)
    for i in (0, 1):
        assert abs(float(parts[i]) - expected[i]) <= 8 * EPS * T * lse
    for i in (2, 3):
        assert error(parts[i], expected[i]) <= 3 * error(reference[i], expected[i])


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(letters="VF"), "letters='VF'"),
    (dict(letters="VD"), "must be"),
    (dict(x=jnp.zeros((2, 3, D), jnp.bfloat16)), "reshape"),
    (dict(x=jnp.zeros((T, D), jnp.float32)), "cast w"),
    (dict(targets=jnp.zeros((T + 1,), jnp.int32)), r"int32\[7\]"),
    (dict(targets=jnp.zeros((T,), jnp.float32)), r"int32\[7\]"),
    (dict(chunk_tokens=0), "chunk_tokens=0"),
    (dict(z_loss=-1.0), "z_loss=-1.0"),
    (dict(softcap=0.0), "softcap=0.0"),
    (dict(implementation="cudnn"), "it has mosaic, xla"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_use_is_an_error_that_says_what_to_do(change, message):
    x, w, targets = draw()
    arguments: dict[str, Any] = dict(x=x, w=w, targets=targets, letters="DV")
    arguments |= dict(z_loss=0.0, softcap=None, chunk_tokens=4, with_gradients=True)
    arguments |= change
    tensors = [arguments.pop(name) for name in ("x", "w", "targets")]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*tensors, **arguments)


@pytest.mark.parametrize(
    ("target", "dtype", "num_words", "message"),
    [
        (Target("cpu", "cpu", 1), "bfloat16", V, r"device cpu \(Hopper\); use xla"),
        (H200, "float32", V, "dtype float32"),
        (H200, "bfloat16", 50257, "vocabulary of 50257 on a device"),
        (H200, "bfloat16", 512, "at least 1024"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_and_auto_knows(
    target, dtype, num_words, message
):
    x_TD, w_DV = abstract(dtype, num_words)
    choose = functools.partial(choose_cross_entropy, x_TD, w_DV, letters="DV")
    with traced_for(target):
        with pytest.raises(NotImplementedError, match=message):
            choose(implementation="mosaic")
        assert choose(implementation="auto").implementation == "xla"


def test_auto_takes_the_kernels_for_a_hopper_gpu():
    x_TD, w_DV = abstract("bfloat16", 128256)
    with traced_for(H200):
        choice = choose_cross_entropy(x_TD, w_DV, letters="DV")
    assert choice.implementation == "mosaic"


def abstract(dtype: str, num_words: int) -> list[jax.ShapeDtypeStruct]:
    shapes = ((8, 64), (64, num_words))
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]


def test_float32_logits_take_no_more_than_a_quarter_of_a_gibibyte():
    for num_words, rows in {128256: 512, 50304: 1280, 16032: 2048}.items():
        assert rows_of_logits(num_words, 2048) <= rows
        assert 4 * num_words * rows_of_logits(num_words, 2048) <= 2**28
