# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy and its gradients against all logits in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy

T, D, V = 37, 16, 48
EPS = float(np.finfo(np.float32).eps)


def draw(dtype=jnp.float32, scale=1.0, letters="DV"):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(T, D)), dtype)
    w = jnp.asarray(scale * rng.normal(size=(D, V)), dtype)
    targets = rng.integers(0, V, T).astype(np.int32)
    targets[::5] = -1
    return x, (w if letters == "DV" else w.T), jnp.asarray(targets)


def naive(x, w, targets, *, letters="DV", z_loss=0.0, softcap=None):
    """nll, objective, dx and dw from all logits in float64, by the chain rule."""
    x, targets = np.asarray(x.astype(jnp.float32), np.float64), np.asarray(targets)
    w = np.asarray(w.astype(jnp.float32), np.float64)
    w = w if letters == "DV" else w.T
    raw = x @ w
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = logits.max(-1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    counts = (targets >= 0)[:, None]
    hot = (np.arange(V) == targets[:, None]).astype(np.float64)
    nll = np.where(counts, lse - (hot * logits).sum(-1, keepdims=True), 0).sum()
    penalty = z_loss * np.where(counts, lse**2, 0).sum()
    dlogits = np.exp(logits - lse) * (1 + 2 * z_loss * lse) - hot
    if softcap is not None:
        dlogits *= 1 - np.tanh(raw / softcap) ** 2
    dlogits = np.where(counts, dlogits, 0)
    dx, dw = dlogits @ w.T, x.T @ dlogits
    return nll, nll + penalty, dx, dw if letters == "DV" else dw.T


def run(x, w, targets, *, chunk_tokens=8, with_gradients=True, **options):
    options = dict(letters="DV", z_loss=0.0, softcap=None) | options
    return _jitted(
        x,
        w,
        targets,
        chunk_tokens=chunk_tokens,
        with_gradients=with_gradients,
        **options,
    )


_jitted = jax.jit(
    linear_cross_entropy,
    static_argnames=(
        "letters",
        "z_loss",
        "softcap",
        "chunk_tokens",
        "vocab_axes",
        "with_gradients",
    ),
)


OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(letters="VD"),
    dict(z_loss=0.1),
    dict(softcap=2.0),
    dict(letters="VD", z_loss=0.1, softcap=2.0),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradients_are_those_of_all_logits(options):
    x, w, targets = draw(letters=options.get("letters", "DV"))
    terms = run(x, w, targets, **options)
    nll, objective, dx, dw = naive(x, w, targets, **options)
    # Relative to the largest entry: sums of T, D or V products of that size.
    tolerance = 4 * EPS * np.sqrt(T * D)
    assert float(terms.nll) == pytest.approx(nll, rel=tolerance)
    assert float(terms.objective) == pytest.approx(objective, rel=tolerance)
    np.testing.assert_allclose(terms.dx_TD, dx, atol=tolerance * np.abs(dx).max())
    np.testing.assert_allclose(terms.dw, dw, atol=tolerance * np.abs(dw).max())


def test_the_hand_made_gradients_are_those_of_jax():
    x, w, targets = draw()

    def objective(x, w):
        options: Any = dict(z_loss=0.05, softcap=3.0)
        return run(x, w, targets, with_gradients=False, **options).objective

    terms = run(x, w, targets, z_loss=0.05, softcap=3.0)
    dx, dw = jax.grad(objective, argnums=(0, 1))(x, w)
    atol = 8 * EPS * np.sqrt(T * D) * float(np.abs(dw).max())
    np.testing.assert_allclose(terms.dx_TD, dx, atol=atol)
    np.testing.assert_allclose(terms.dw, dw, atol=atol)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 38, 10_000])
def test_the_size_of_a_chunk_does_not_matter(chunk_tokens):
    x, w, targets = draw()
    whole = run(x, w, targets, z_loss=0.1, chunk_tokens=T)
    parts = run(x, w, targets, z_loss=0.1, chunk_tokens=chunk_tokens)
    for a, b in zip(parts, whole, strict=True):
        atol = EPS * np.sqrt(T) * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=2 * atol, rtol=0)


def test_tokens_without_a_target_count_for_nothing():
    x, w, targets = draw()
    noisy = jnp.where((targets < 0)[:, None], 100 * x, x)
    a, b = run(x, w, targets, z_loss=0.1), run(noisy, w, targets, z_loss=0.1)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.any(np.asarray(a.dx_TD)[np.asarray(targets) < 0])


def test_a_batch_without_targets_is_zero():
    x, w, targets = draw()
    terms = run(x, w, jnp.full_like(targets, -1), z_loss=0.1)
    for value in terms:
        assert not np.any(value)


def test_extreme_logits_are_finite():
    x, w, targets = draw(scale=1e6)
    for softcap in (None, 30.0):
        terms = run(x, w, targets, z_loss=1e-4, softcap=softcap)
        assert all(np.all(np.isfinite(value)) for value in terms)


def test_without_gradients_none_are_made():
    x, w, targets = draw()
    terms = run(x, w, targets, with_gradients=False)
    assert terms.dx_TD is None
    assert terms.dw is None
    assert float(terms.nll) == float(run(x, w, targets).nll)


def test_bfloat16_inputs_have_a_float32_loss_and_weight_gradient():
    x, w, targets = draw(jnp.bfloat16)
    terms = run(x, w, targets)
    nll, _, dx, dw = naive(x, w, targets)
    assert terms.dw is not None
    assert terms.dx_TD is not None
    assert (terms.nll.dtype, terms.dw.dtype) == (jnp.float32, jnp.float32)
    assert terms.dx_TD.dtype == jnp.bfloat16
    # Logits are float32 sums of exact products: the value has float32's error.
    assert float(terms.nll) == pytest.approx(nll, rel=4 * EPS * np.sqrt(T * D))
    # The gradient of the logits is rounded to 8 bits before its matmuls.
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(terms.dw, dw, atol=eps * np.abs(dw).max())
    got = terms.dx_TD.astype(jnp.float32)
    np.testing.assert_allclose(got, dx, atol=2 * eps * np.abs(dx).max())


@pytest.mark.parametrize("axes", [("tensor",), ("data", "tensor")])
@pytest.mark.parametrize("options", [dict(z_loss=0.1), dict(letters="VD", softcap=2.0)])
def test_a_vocabulary_cut_over_devices_gives_the_same(axes, options):
    shape = (2, 4) if len(axes) == 2 else (8,)
    mesh = jax.make_mesh(
        shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    letters = options.get("letters", "DV")
    x, w, targets = draw(letters=letters)
    cut = jax.P(*(axes if letter == "V" else None for letter in letters))
    block = functools.partial(run, vocab_axes=axes, **options)
    outs = type(run(x, w, targets, **options))(jax.P(), jax.P(), jax.P(), cut)
    parts = jax.jit(
        jax.shard_map(
            block,
            mesh=mesh,
            in_specs=(jax.P(), cut, jax.P()),
            out_specs=outs,
            check_vma=False,
        )
    )(x, w, targets)
    whole = run(x, w, targets, **options)
    for a, b in zip(parts, whole, strict=True):
        atol = 4 * EPS * np.sqrt(T * D) * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_no_array_of_all_logits_exists(with_gradients):
    x, w, targets = draw()
    block = functools.partial(run, with_gradients=with_gradients)
    text = jax.jit(block).lower(x, w, targets).compile().as_text() or ""
    assert f"[8,{V}]" in text  # a chunk's
    for rows in (T, 40):  # 40: with the padding to whole chunks
        assert f"[{rows},{V}]" not in text
    assert f"[5,8,{V}]" not in text
