# SPDX-License-Identifier: Apache-2.0
"""Which experts the router picks, and that their loads become even."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import MoEConfig, MoEVariantConfig
from jaxllm.models.moe.routing import route

B, T, E = 2, 16, 6
EPS = float(np.finfo(np.float32).eps)


def draw_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, T, E)).astype(np.float32)


def config(**changes) -> MoEConfig:
    return MoEConfig(**{"num_experts": E, "experts_per_token": 2, **changes})


@functools.partial(jax.jit, static_argnums=(2, 3))
def routed(logits, is_token, config, capacity=None, bias=None):
    return route(logits, bias, is_token, config, capacity)


EVERY = np.ones((B, T), bool)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_token_has_its_best_experts_and_their_scores(router, renormalize):
    logits = draw_logits()
    routes, _ = routed(logits, EVERY, config(router=router, renormalize=renormalize))
    wide = logits.astype(np.float64)
    scores = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    if router == "sigmoid":
        scores = 1 / (1 + np.exp(-wide))
    best = np.argsort(-scores, -1)[..., :2]
    np.testing.assert_array_equal(routes.choice_BTA, best)
    share = np.take_along_axis(scores, best, -1)
    if renormalize:
        share /= share.sum(-1, keepdims=True)
    np.testing.assert_allclose(routes.share_BTA, share, rtol=8 * EPS)


@functools.partial(jax.jit, static_argnums=(2,))
def slopes(logits, bias, options):
    """Returns shares and penalty of a token, and the gradient of their sum."""

    def total(logits):
        routes, stats = route(logits, bias, jnp.ones((1, 1), bool), options, None)
        weights = jnp.arange(1, 3, dtype=jnp.float32)
        total = (routes.share_BTA[0, 0] * weights).sum() + stats["penalty"]
        return total, (routes, stats)

    return jax.grad(total, has_aux=True)(logits)


@pytest.mark.parametrize("balance", ["loss", "bias"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=E, max_size=E),
    bias=st.lists(st.floats(-2, 2, width=32), min_size=E, max_size=E),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_finite_logits_give_finite_numbers(router, renormalize, balance, logits, bias):
    options = config(router=router, renormalize=renormalize, balance=balance)
    x = np.array(logits, np.float32)
    bias = jnp.array(bias) if balance == "bias" else None
    slope, (routes, stats) = slopes(jnp.asarray(x)[None, None], bias, options)
    for each in (slope, routes.share_BTA, *stats.values()):
        assert np.isfinite(each).all()
    wide = np.float64(x)
    log = wide if router == "softmax" else -np.logaddexp(0, -wide)
    if renormalize:
        chosen = log[np.asarray(routes.choice_BTA)[0, 0]]
        share = np.exp(chosen - np.logaddexp.reduce(chosen))
        # A difference of logarithms has an error of both, which exp makes relative.
        rtol = 8 * EPS * (1 + np.abs(chosen).max())
        np.testing.assert_allclose(routes.share_BTA[0, 0], share, rtol=rtol, atol=1e-37)
    if bias is None:
        best = np.sort(x[routes.choice_BTA[0, 0]])
        np.testing.assert_array_equal(best, np.sort(x)[-2:])


def test_of_equal_scores_the_first_experts_are_chosen():
    logits = np.tile(np.array([0, 1, 1, 1, 0, 1], np.float32), (B, T, 1))
    routes, _ = routed(logits, EVERY, config(experts_per_token=3))
    np.testing.assert_array_equal(routes.choice_BTA, np.tile([1, 2, 3], (B, T, 1)))


def test_padding_has_no_expert_no_share_and_counts_nowhere():
    logits, is_token = draw_logits(), EVERY.copy()
    is_token[:, T // 2 :] = False
    options = config(balance="loss", router_z_loss=0.1)
    routes, stats = routed(logits, is_token, options, 1)
    assert np.all(np.asarray(routes.choice_BTA)[~is_token] == E)
    assert not np.any(np.asarray(routes.share_BTA)[~is_token])
    shorter = routed(logits[:, : T // 2], is_token[:, : T // 2], options, 1)[1]
    for name in stats:
        np.testing.assert_allclose(stats[name], shorter[name], rtol=8 * EPS)


def test_statistics_of_even_loads_are_1_and_of_one_expert_the_largest():
    even = np.zeros((B, 3 * E, E), np.float32)
    for token in range(3 * E):
        even[:, token, [token % E, (token + 1) % E]] = 20.0
    is_token = np.ones(even.shape[:2], bool)
    stats = routed(even, is_token, config(), 3 * E)[1]
    for name in ("router_load", "router_balance_loss"):
        assert float(stats[name]) == pytest.approx(1, rel=1e-6)
    assert float(stats["router_dropped"]) == 0
    one = np.zeros((B, T, E), np.float32)
    one[..., 4] = 100.0
    stats = routed(one, EVERY, config(experts_per_token=1), 4)[1]
    assert float(stats["router_load"]) == float(stats["router_balance_loss"]) == E
    assert float(stats["router_dropped"]) == 1 - 4 / T
    assert float(stats["router_entropy"]) == pytest.approx(0, abs=EPS)
    flat = routed(np.zeros((B, T, E), np.float32), EVERY, config())[1]
    assert float(flat["router_entropy"]) == pytest.approx(1, rel=4 * EPS)


def test_the_penalty_is_what_the_settings_say():
    logits = draw_logits()
    assert float(routed(logits, EVERY, config())[1]["penalty"]) == 0
    stats = routed(
        logits, EVERY, config(balance="loss", balance_weight=0.5, router_z_loss=0.25)
    )[1]
    z_loss = np.mean(np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2)
    expected = 0.5 * float(stats["router_balance_loss"]) + 0.25 * z_loss
    assert float(stats["penalty"]) == pytest.approx(expected, rel=8 * EPS)


def skewed_loads(balance: str) -> np.ndarray:
    """Returns the largest load at each step of a router whose logits are skewed.

    The logits are learned: descent on the penalty, and the bias by its load errors.
    """
    weight = dict(none=0.0, loss=1.0, bias=0.005)[balance]
    options = config(balance=balance, balance_weight=weight, router="sigmoid")
    noise = np.random.default_rng(1).normal(size=(B, 64, E)).astype(np.float32)
    is_token = jnp.ones(noise.shape[:2], bool)

    @jax.jit
    def step(skew_R, bias_R):
        def penalty(skew_R, bias_R):
            logits = noise + skew_R[None, None]
            bias = bias_R if balance == "bias" else None
            routes, stats = route(logits, bias, is_token, options, None)
            # The error reaches the bias through the shares, whatever their gradient.
            return stats["penalty"] + 0.0 * routes.share_BTA.sum(), stats

        (d_skew, d_bias), stats = jax.grad(penalty, (0, 1), has_aux=True)(
            skew_R, bias_R
        )
        bias_R = bias_R - weight * jnp.sign(d_bias)
        return skew_R - d_skew, bias_R, stats["router_load"]

    state = (0.4 * jnp.arange(E, dtype=jnp.float32), jnp.zeros(E))
    loads = []
    for _ in range(100):
        *state, load = step(*state)
        loads.append(float(load))
    return np.array(loads)


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_balancing_makes_skewed_loads_more_even(balance):
    before = skewed_loads("none")
    assert before[-1] == before[0] > 2
    after = skewed_loads(balance)
    assert after[0] == before[0]
    assert after[-10:].max() < 1.3


def test_a_bias_changes_the_choice_and_no_share():
    logits = draw_logits()
    bias = np.zeros(E, np.float32)
    bias[3] = 10.0
    options = config(balance="bias")
    routes, _ = routed(logits, EVERY, options, None, bias)
    assert np.all(np.asarray(routes.choice_BTA)[..., 0] == 3)
    scores = jax.nn.softmax(logits)
    expected = np.take_along_axis(np.asarray(scores), np.asarray(routes.choice_BTA), -1)
    np.testing.assert_allclose(routes.share_BTA, expected, rtol=4 * EPS)


@pytest.mark.parametrize("group_best", [1, 2])
def test_a_token_has_experts_of_its_best_group_alone(group_best):
    logits = draw_logits()
    options = config(
        router="sigmoid", variant=MoEVariantConfig(groups=3, group_best=group_best)
    )
    bias = np.linspace(-0.3, 0.3, E, dtype=np.float32)[::-1]
    routes, _ = routed(logits, EVERY, options, None, bias)
    rank = 1 / (1 + np.exp(-logits)) + bias
    groups = rank.reshape(B, T, 3, 2)
    best = np.sort(groups, -1)[..., -group_best:].sum(-1)
    is_best = best == best.max(-1, keepdims=True)
    groups = np.where(is_best[..., None], groups, -np.inf)
    expected = np.argsort(-groups.reshape(rank.shape), -1)[..., :2]
    np.testing.assert_array_equal(routes.choice_BTA, expected)
    free, _ = routed(logits, EVERY, config(router="sigmoid"), None, bias)
    assert np.any(np.asarray(free.choice_BTA) != expected)


def test_a_scale_multiplies_every_share():
    logits = draw_logits()
    plain, _ = routed(logits, EVERY, config(renormalize=True))
    variant = MoEVariantConfig(route_scale=2.5)
    scaled, _ = routed(logits, EVERY, config(renormalize=True, variant=variant))
    expected = np.asarray(plain.share_BTA) * np.float32(2.5)
    np.testing.assert_array_equal(scaled.share_BTA, expected)


def test_a_constant_bias_has_no_gradient():
    options = config(balance="loss", variant=MoEVariantConfig(choice_bias=True))

    def total(bias):
        routes, stats = routed(draw_logits(), EVERY, options, None, bias)
        return routes.share_BTA.sum() + stats["penalty"]

    np.testing.assert_array_equal(jax.grad(total)(jnp.arange(E) / E), np.zeros(E))


def test_the_gradient_of_a_bias_is_how_far_its_load_is_above_the_mean():
    logits = draw_logits()

    def total(bias):
        return routed(logits, EVERY, config(balance="bias"), None, bias)[0].share_BTA[
            0, 0, 0
        ]

    error = jax.grad(total)(jnp.zeros(E))
    best = np.argsort(-logits, -1)[..., :2]
    counts = np.bincount(best.ravel(), minlength=E)
    np.testing.assert_allclose(error, counts - counts.mean(), atol=EPS * counts.max())
