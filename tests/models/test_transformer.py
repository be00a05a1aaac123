# SPDX-License-Identifier: Apache-2.0
"""What the transformer promises, whatever its options."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import (
    LossConfig,
    ModelConfig,
    MoEConfig,
    MoEVariantConfig,
    RopeConfig,
    VariantConfig,
    presets,
)
from jaxllm.models import Model, make_cache
from jaxllm.plan import budget
from jaxllm.step.loss import Loss, next_token_loss

B, T = 2, 12
EPS = float(np.finfo(np.float32).eps)
BASE = ModelConfig(
    vocab_size=40,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    d_ff=24,
    dtype="float32",
)
# Sums of up to d_ff products a matmul, about 8 matmuls in a row, on logits below 1.
TOLERANCE = 8 * EPS * math.sqrt(BASE.d_ff)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": dict(num_kv_heads=2),
    "one key head": dict(num_kv_heads=1),
    "qk-norm": dict(qk_norm=True),
    "qkv bias": dict(bias="qkv"),
    "all biases, layernorm, gelu": dict(bias="all", norm="layernorm", mlp="gelu"),
    "geglu, tied": dict(mlp="geglu", tie_embeddings=True),
    "a window": dict(windows=(3,)),
    "windows": dict(windows=(3, 0), num_layers=4),
    "soft-caps": dict(attention_softcap=1.5, logit_softcap=0.5),
    "unrolled windows": dict(windows=(3, 0), scan_layers=False),
    "chunks": dict(
        qk_norm=True,
        rope=RopeConfig(layers=(True, False), reversed=True),
        variant=VariantConfig(
            qk_norm="rotated", attention_chunk=3, nope_growth=0.5, nope_length=2
        ),
    ),
    "experts": dict(
        moe=MoEConfig(num_experts=4, experts_per_token=2, renormalize=True)
    ),
    "shared experts, sigmoid, biases": dict(
        windows=(3, 0),
        mlp="gelu",
        bias="qkv",
        moe=MoEConfig(
            num_experts=3,
            d_ff_expert=8,
            num_shared_experts=2,
            router="sigmoid",
            balance="bias",
        ),
    ),
    "a dense layer, then experts in every second": dict(
        num_layers=5,
        windows=(0, 3),
        moe=MoEConfig(
            num_experts=4,
            experts_per_token=2,
            d_ff_expert=8,
            num_shared_experts=1,
            variant=MoEVariantConfig(
                d_ff_shared=12,
                shared_gate=True,
                choice_bias=True,
                route_scale=1.5,
                first_dense=1,
                layers=(False, True),
            ),
        ),
    ),
}
every_option = pytest.mark.parametrize("option", OPTIONS)


@functools.cache
def built(option: str = "plain", **changes) -> tuple[Model, Any]:
    """Returns a model and parameters with no value at its default, made by NumPy.

    Not by `init`, whose compilation takes longer than that of the model.
    """
    model = Model(dataclasses.replace(BASE, **(OPTIONS[option] | changes)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if "scale" in str(path[-1]):
            return np.float32(1 + 0.1 * noise)
        return np.float32(noise * (0.1 if "bias" in str(path[-1]) else 0.2))

    return model, jax.tree.map_with_path(draw, model.abstract)


def draw_tokens(rows: int = B, length: int = T) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, BASE.vocab_size, (rows, length)).astype(np.int32)


def arange(rows: int = B, length: int = T) -> np.ndarray:
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


@functools.cache
def forward(model: Model):
    """Returns a compiled (params, tokens, positions, segments or None) -> logits."""

    def logits(params, tokens_BT, positions_BT, segments_BT):
        module = model.bind(params)
        x_BTD, _ = module(tokens_BT, positions_BT, segments_BT)
        return module.logits(x_BTD)

    return jax.jit(logits)


def logits_of(option: str, tokens=None, positions=None, segments=None) -> np.ndarray:
    model, params = built(option)
    tokens = draw_tokens() if tokens is None else tokens
    positions = arange(*tokens.shape) if positions is None else positions
    return np.asarray(forward(model)(params, tokens, positions, segments))


def influence(option: str) -> np.ndarray:
    """Says which embedded tokens have a gradient from which outputs: [T out, T in]."""
    model, params = built(option)
    tokens = jnp.arange(T, dtype=jnp.int32)[None]  # each word once: rows of the table

    @jax.jit
    def slope(table_VD, weights_TD):
        def output(table_VD):
            module = model.bind({**params, "embedding": table_VD})
            return (module(tokens, jnp.asarray(arange(1)))[0][0] * weights_TD).sum()

        return jax.grad(output)(table_VD)

    rows = []
    for t in range(T):
        weights = np.zeros((T, BASE.d_model), np.float32)
        weights[t] = np.arange(1, BASE.d_model + 1)
        slopes = np.asarray(slope(params["embedding"], weights))[:T]
        rows.append(np.abs(slopes).sum(-1) > 0)
    return np.stack(rows)


@every_option
def test_a_logit_has_no_gradient_from_a_later_token(option):
    seen = influence(option)
    assert not np.any(np.triu(seen, 1))
    assert np.all(np.diag(seen))
    if "window" not in option:
        assert np.all(np.tril(seen) == np.tri(T, dtype=bool))


def test_a_window_limits_how_far_back_two_layers_see():
    seen = influence("a window")
    reach = np.subtract.outer(np.arange(T), np.arange(T))
    # Each layer sees 2 tokens before its own.
    np.testing.assert_array_equal(seen, (reach >= 0) & (reach <= 4))


@every_option
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(option):
    tokens = draw_tokens(1)
    segments = np.array([[1] * 5 + [2] * 6 + [0]], np.int32)
    positions = np.concatenate([np.arange(5), np.arange(6), [0]]).astype(np.int32)[None]
    packed = logits_of(option, tokens, positions, segments)
    for start, stop in [(0, 5), (5, 11)]:
        # Padded behind to the same shape: causality keeps the padding out of sight.
        alone = np.zeros_like(tokens)
        alone[:, : stop - start] = tokens[:, start:stop]
        expected = logits_of(option, alone)[:, : stop - start]
        np.testing.assert_allclose(packed[:, start:stop], expected, atol=TOLERANCE)


@every_option
def test_decoding_with_a_cache_gives_the_logits_of_a_full_forward(option):
    model, params = built(option)
    tokens, prompt = draw_tokens(), 5

    @jax.jit
    def step(params, tokens_BT, positions_BT, cache):
        module = model.bind(params)
        x_BTD, cache = module(tokens_BT, positions_BT, cache=cache)
        return module.logits(x_BTD), cache

    cache = make_cache(model.config, B, T + 3)
    pieces = []
    for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, T)]:
        part = slice(start, stop)
        logits, cache = step(params, tokens[:, part], arange()[:, part], cache)
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(got, logits_of(option), atol=TOLERANCE)


def unstacked(stacked: Any, config: ModelConfig) -> Any:
    """Rearranges the parameters of a scanned model for the unrolled one."""
    period = len(config.period)
    blocks = {
        str(repeat * period + int(name)): jax.tree.map(lambda p, r=repeat: p[r], block)
        for name, block in stacked["blocks"].items()
        for repeat in range((config.num_layers - len(config.leading)) // period)
    }
    return {**stacked, "blocks": blocks}


DEPTHS = "a dense layer, then experts in every second"


@pytest.mark.parametrize("option", ["plain", "windows", DEPTHS])
def test_scanned_and_unrolled_layers_are_the_same_model(option):
    model, params = built(option)
    unrolled = Model(dataclasses.replace(model.config, scan_layers=False))
    moved = unstacked(params, model.config)
    got = forward(unrolled)(moved, draw_tokens(), arange(), None)
    np.testing.assert_allclose(got, logits_of(option), atol=TOLERANCE)


def test_scanned_and_unrolled_layers_start_from_the_same_numbers():
    config = dataclasses.replace(BASE, mlp="gelu", tie_embeddings=True)
    scanned, unrolled = (
        Model(config),
        Model(dataclasses.replace(config, scan_layers=False)),
    )
    both = jax.jit(lambda key: (scanned.init(key), unrolled.init(key)))
    one, other = both(jax.random.key(1))
    same = jax.tree.map(np.array_equal, unstacked(one, config), other)
    assert all(jax.tree.leaves(same))


@functools.cache
def gradients_of(option: str = "plain", scan_layers: bool = True, **changes):
    """Returns the summed loss of a batch and its gradients."""
    model, params = built(option, scan_layers=scan_layers)
    model = Model(dataclasses.replace(model.config, **changes))
    tokens, positions = jnp.asarray(draw_tokens()), jnp.asarray(arange())
    targets = jnp.roll(tokens, -1, 1)

    @jax.jit
    def run(params):
        def loss(params):
            module = model.bind(params)
            x_BTD, _ = module(tokens, positions)
            w, letters = module.output_weights()
            options = Loss(letters, model.config.logit_softcap, LossConfig())
            return next_token_loss(x_BTD, w, targets, options)[0]

        return jax.value_and_grad(loss)(params)

    return run(params)


@pytest.mark.parametrize("remat", ["full", "dots", "save_attention"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_changes_neither_loss_nor_gradients(remat, scan_layers):
    value, gradients = gradients_of(scan_layers=scan_layers)
    again, recomputed = gradients_of(scan_layers=scan_layers, remat=remat)
    assert float(again) == pytest.approx(float(value), rel=4 * EPS)
    for a, b in zip(*map(jax.tree.leaves, (recomputed, gradients)), strict=True):
        atol = 16 * EPS * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def test_remat_keeps_less_for_the_backward_pass():
    def bytes_kept(remat):
        config = dataclasses.replace(BASE, num_layers=8, remat=remat, d_ff=256)
        model = Model(config)

        def total(params, tokens_BT, positions_BT):
            return model.bind(params)(tokens_BT, positions_BT)[0].sum()

        ints = jax.ShapeDtypeStruct((8, 64), jnp.int32)
        step = jax.jit(jax.grad(total)).lower(model.abstract, ints, ints).compile()
        memory = step.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    kept = {remat: bytes_kept(remat) for remat in ("none", "dots", "full")}
    assert kept["full"] < kept["dots"] < kept["none"]


def test_leading_layers_are_recomputed_too():
    options = OPTIONS[DEPTHS] | dict(remat="full")
    model = Model(dataclasses.replace(BASE, **options))

    def total(params, tokens_BT):
        return model.bind(params)(tokens_BT, tokens_BT)[0].sum()

    ints = jax.ShapeDtypeStruct((B, T), jnp.int32)
    traced = jax.make_jaxpr(total)(model.abstract, ints)
    kept = [e.params["prevent_cse"] for e in traced.eqns if "prevent_cse" in e.params]
    assert kept == [True]  # outside of a scan XLA would merge both passes again


def test_the_first_loss_is_near_that_of_a_uniform_guess():
    config = dataclasses.replace(BASE, vocab_size=512, d_model=64)
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 512, (8, 32)).astype(np.int32)
    logits = np.asarray(forward(model)(params, tokens, arange(8, 32), None))
    # Logits are sums of d_model normed values times 0.02: their variance is
    # 64 * 0.02**2, and a softmax of normal logits costs half of that.
    nll = np.log(np.exp(logits).sum(-1)).mean()
    assert nll == pytest.approx(math.log(512) + 64 * 0.02**2 / 2, abs=0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(tied):
    config = dataclasses.replace(BASE, dtype="bfloat16", tie_embeddings=tied)
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (B, T, config.d_model), jnp.bfloat16)
    logits = jax.jit(lambda p, x: model.bind(p).logits(x))(params, x_BTD)
    w = params["embedding"].T if tied else params["output"]
    x, w = np.asarray(x_BTD, np.float64), np.asarray(w.astype(jnp.bfloat16), np.float64)
    exact, sizes = x @ w, np.abs(x) @ np.abs(w)
    assert logits.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32; their sums are of d_model.
    assert np.all(np.abs(logits - exact) <= config.d_model * EPS * sizes)


def test_a_bfloat16_model_has_float32_parameters_and_gradients():
    value, gradients = gradients_of(dtype="bfloat16")
    found = {str(leaf.dtype) for leaf in jax.tree.leaves((value, gradients))}
    assert found == {"float32"}
    model = Model(dataclasses.replace(BASE, dtype="bfloat16"))
    ints = jax.ShapeDtypeStruct((B, T), jnp.int32)
    x_BTD, _ = jax.eval_shape(lambda p, t: model.bind(p)(t, t), model.abstract, ints)
    assert x_BTD.dtype == jnp.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.abstract)} == {"float32"}


@pytest.mark.parametrize(
    "option", ["plain", "all biases, layernorm, gelu", "soft-caps"]
)
def test_bfloat16_is_close_to_float32(option):
    exact, _ = gradients_of(option)
    rounded, gradients = gradients_of(option, dtype="bfloat16")
    # Each token's loss moves by about eps * a logit (about 1) a layer, at random.
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert abs(float(rounded - exact)) / (B * T) < eps * BASE.num_layers
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


@every_option
def test_every_parameter_has_letters_for_its_shape_and_a_gradient(option):
    model, _ = built(option)
    scan_layers = model.config.scan_layers
    gradients = gradients_of(option, scan_layers=scan_layers)[1]
    for path, leaf in jax.tree.leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert len(model.letters[name]) == leaf.ndim, name
        constant = model.config.moe.variant.choice_bias and name.endswith("router_bias")
        assert np.any(leaf) != constant, name


def test_tied_models_have_one_table():
    assert (
        "output" not in Model(dataclasses.replace(BASE, tie_embeddings=True)).abstract
    )
    assert "output" in Model(BASE).abstract


PRESETS = [
    "tiny_1m",
    "small_15m",
    "base_124m",
    "llama_350m",
    "llama_1b",
    "llama_3b",
    "llama_8b",
    "llama_70b",
    "qwen3_0_6b",
    "gemma_like_1b",
    "tiny_moe_3m",
    "mixtral_8x7b",
    "qwen3_30b_a3b",
]


@pytest.mark.parametrize("name", [*PRESETS, *OPTIONS])
def test_the_budget_counts_the_parameters_that_a_model_has(name):
    config = (
        getattr(presets, name)()
        if name in PRESETS
        else dataclasses.replace(BASE, **OPTIONS[name])
    )
    leaves = jax.tree.leaves(Model(config).abstract)
    assert budget.num_parameters(config) == sum(
        math.prod(leaf.shape) for leaf in leaves
    )
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("tied", [False, True])
def test_the_flops_formula_is_what_xla_counts_in_an_unrolled_model(tied):
    config = dataclasses.replace(
        BASE,
        vocab_size=1024,
        d_model=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=384,
        tie_embeddings=tied,
        scan_layers=False,
    )
    model, rows, length = Model(config), 2, 128
    tokens = rows * length

    def loss(params, tokens_BT, positions_BT):
        module = model.bind(params)
        x_BTD, _ = module(tokens_BT, positions_BT)
        w, letters = module.output_weights()
        chunk = LossConfig(chunk_tokens=tokens)  # one: a scan's body is counted once
        return next_token_loss(x_BTD, w, tokens_BT, Loss(letters, None, chunk))[0]

    ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    step = jax.jit(jax.grad(loss)).lower(model.abstract, ints, ints).compile()
    cost = step.cost_analysis()
    assert cost is not None
    # causal=False: plain attention computes all pairs and masks half of them.
    formula = tokens * budget.flops_per_token(config, length, causal=False)
    # What the formula leaves out: element-wise work, at most about 40 operations for
    # each value that a layer makes forward and backward, and for each logit.
    layer = 8 * config.d_model + 3 * config.d_ff + config.num_heads * length
    elementwise = 40 * tokens * (config.num_layers * layer + config.vocab_size)
    print(f"\nXLA counts {cost['flops'] / formula:.4f} of the formula's FLOPs")
    assert formula <= cost["flops"] <= formula + elementwise
    assert elementwise < 0.15 * formula  # else the bound would say nothing
