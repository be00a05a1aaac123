# SPDX-License-Identifier: Apache-2.0
"""Text from a model: what is drawn, for whom, and when it ends."""

import dataclasses
import functools
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.inference import Sampling
from jaxllm.inference.sampling import (
    LEAST,
    PIECE,
    SHORTEST_CACHE,
    cache_length,
    keep_likely,
    sample_tokens,
)
from jaxllm.models import Model
from pallas_kernels import choose_attention
from pallas_kernels.target import H200, traced_for

CONFIG = ModelConfig(
    vocab_size=24,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=16,
    windows=(0, 4),
    dtype="float32",
)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
GREEDY = Sampling(temperature=0)


@functools.cache
def built() -> tuple[Model, Any]:
    """Returns a model whose logits differ clearly from one token to the next."""
    model = Model(CONFIG)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32)

    return model, jax.tree.map(draw, model.abstract)


def sample(prompts=PROMPTS, *, max_tokens=6, sampling=GREEDY, **others):
    """Returns the text of each prompt as rows, with None where it has ended."""
    model, params = built()
    columns = sample_tokens(
        model,
        params,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        **others,
    )
    return [list(row) for row in zip(*columns, strict=True)]


@functools.cache
def greedy_text(max_tokens: int = 6):
    return sample(max_tokens=max_tokens)


def test_greedy_text_is_the_argmax_of_a_full_forward_each_time():
    model, params = built()

    @jax.jit
    def logits(tokens_BT, positions_BT):
        module = model.bind(params)
        return module.logits(module(tokens_BT, positions_BT)[0])

    width = 2 * PIECE + 32
    positions = np.arange(width, dtype=np.int32)[None]
    rng = np.random.default_rng(1)
    # One is as long as a piece, one is longer by its last token, one has three pieces.
    long = [rng.integers(0, 24, PIECE * n // 4).tolist() for n in (4, 5, 9)]
    long[1] = long[1][: PIECE + 1]
    prompts = [*PROMPTS, *long]
    for prompt, text in zip(prompts, sample(prompts), strict=True):
        so_far = list(prompt)
        for token in text:
            # Padding behind does not matter: the model is causal.
            row = np.array([so_far + [0] * (width - len(so_far))], np.int32)
            assert token == int(logits(row, positions)[0, len(so_far) - 1].argmax())
            so_far.append(token)


def test_a_prompts_text_does_not_depend_on_the_other_prompts():
    for prompt, text in zip(PROMPTS, greedy_text(), strict=True):
        assert sample([prompt]) == [text]


def test_drawn_text_does_not_depend_on_later_prompts_or_their_lengths():
    warm = Sampling(temperature=1.0, seed=5)
    first, second, _ = sample(sampling=warm)
    others = [*PROMPTS[:2], list(range(10))]
    assert sample(others, sampling=warm)[:2] == [first, second]


def test_a_seed_gives_its_text_again_and_another_seed_another():
    warm = Sampling(temperature=1.5, seed=1)
    text = sample(sampling=warm)
    assert sample(sampling=warm) == text
    assert text != sample(sampling=Sampling(temperature=1.5, seed=2))


def test_equal_prompts_of_a_batch_have_different_draws():
    one, other = sample([[1, 2], [1, 2]], sampling=Sampling(temperature=1.5))
    assert one != other


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=5)])
def test_the_first_tokens_do_not_depend_on_how_many_are_asked_for(sampling):
    model, params = built()
    assert cache_length(5 + 6) < cache_length(5 + 2 * SHORTEST_CACHE)
    for max_tokens in (3, 2 * SHORTEST_CACHE):
        columns = sample_tokens(
            model, params, PROMPTS, max_tokens=max_tokens, sampling=sampling
        )
        found = list(itertools.islice(columns, 3))
        expected = [row[:3] for row in sample(sampling=sampling)]
        assert [list(row) for row in zip(*found, strict=True)] == expected


@pytest.mark.parametrize("num_tokens", [2, 100, 256, 257, 5000])
def test_the_kernel_for_gpus_takes_pieces_tokens_and_caches(num_tokens):
    k = jax.ShapeDtypeStruct((1, cache_length(num_tokens), 1, 64), jnp.bfloat16)
    assert num_tokens <= k.shape[1] < max(SHORTEST_CACHE + 1, 2 * num_tokens)
    for width, num_heads in itertools.product((PIECE, 1), (1, 4, 8)):
        q = jax.ShapeDtypeStruct((1, width, num_heads, 64), jnp.bfloat16)
        positions = jax.ShapeDtypeStruct((1, width), jnp.int32)
        with traced_for(H200):
            chosen = choose_attention(q, k, positions_BT=positions)
        assert chosen.implementation == "mosaic"


def test_prompts_and_sampling_are_data_of_two_programs(caplog):
    model, params = Model(CONFIG), built()[1]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number, length in enumerate((1, 3, 8, 63, 200)):
            sampling = Sampling(
                temperature=0.5 * number,
                top_k=number % 3,
                top_p=1 - number / 8,
                seed=number,
            )
            prompt = [number + 1] * length
            list(
                sample_tokens(model, params, [prompt], max_tokens=9, sampling=sampling)
            )
    compiled = [m for m in caplog.messages if m.startswith("Compiling ")]
    assert len(compiled) == 2, compiled


def test_a_text_stops_before_its_end_of_document_and_the_others_go_on():
    texts = greedy_text()
    end = texts[0][2]
    ended = sample(ends={end, 99})
    for text, short in zip(texts, ended, strict=True):
        cut = text.index(end) if end in text else len(text)
        kept = min(len(short), cut)
        assert short[:kept] == text[:kept]
        assert all(token is None for token in short[kept:])
    longest = max(t.index(end) if end in t else len(t) for t in texts)
    assert len(ended[0]) == longest  # nothing is yielded after the last has ended


def test_top_k_of_1_and_a_tiny_top_p_are_greedy():
    assert sample(sampling=Sampling(top_k=1)) == greedy_text()
    assert sample(sampling=Sampling(top_p=1e-6)) == greedy_text()


@pytest.mark.parametrize("temperature", [1e-4, LEAST])
def test_a_low_temperature_approaches_greedy(temperature):
    assert sample(sampling=Sampling(temperature=temperature)) == greedy_text()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1e6, seed=2)])
def test_an_id_that_no_token_has_is_never_drawn(sampling):
    known = {3, 8, 23}
    known_V = np.isin(np.arange(CONFIG.vocab_size), list(known))
    texts = sample(sampling=sampling, known_V=known_V, max_tokens=20)
    assert {token for text in texts for token in text} <= known
    assert not {token for text in greedy_text() for token in text} <= known


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=3)])
def test_tensor_parallel_devices_write_the_same_text(devices, sampling):
    mesh = sharding.make_mesh(dict(tensor=devices), jax.devices()[:devices])
    model, params = built()
    plan = sharding.plan(model.abstract, model.letters, mesh)
    params = jax.device_put(params, plan.shardings(params))
    with jax.set_mesh(mesh):
        columns = list(
            sample_tokens(model, params, PROMPTS, max_tokens=6, sampling=sampling)
        )
    expected = greedy_text() if sampling == GREEDY else sample(sampling=sampling)
    assert [list(row) for row in zip(*columns, strict=True)] == expected


keep = jax.jit(keep_likely)
logit_rows = st.lists(
    st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=9, max_size=9),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.integers(0, 12))
def test_top_k_keeps_the_k_likeliest_and_their_ties(rows, k):
    logits = np.array(rows, np.float32)
    kept = np.asarray(keep(logits, k, np.float32(1)))
    for before, after in zip(logits, kept, strict=True):
        border = np.sort(before)[::-1][min(k, 9) - 1] if k else -np.inf
        np.testing.assert_array_equal(after, np.where(before < border, -np.inf, before))


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.integers(1, 20).map(lambda i: i / 20))
def test_top_p_keeps_the_fewest_likeliest_that_hold_p(rows, p):
    logits = np.array(rows, np.float32)
    kept = np.isfinite(keep(logits, 0, np.float32(p)))
    for row, mask in zip(logits.astype(np.float64), kept, strict=True):
        chances = np.exp(row - row.max())
        chances /= chances.sum()
        assert chances[mask].sum() >= p - 1e-5
        assert mask[row == row.max()].all()
        # Likelier tokens than the least likely kept one do not hold p alone.
        assert chances[row > row[mask].min()].sum() < p + 1e-5
        assert mask[row >= row[mask].min()].all()


def test_draws_have_the_models_frequencies():
    model, params = built()
    prompts = [[7, 7]] * 4096
    (column,) = sample_tokens(
        model, params, prompts, max_tokens=1, sampling=Sampling(temperature=2.0)
    )
    module = model.bind(params)
    tokens, positions = jnp.array([[7, 7]]), jnp.array([[0, 1]])
    x_BTD, _ = module(tokens, positions)
    chances = np.asarray(jax.nn.softmax(module.logits(x_BTD)[0, -1] / 2.0), np.float64)
    counts = np.bincount(np.array(column, int), minlength=CONFIG.vocab_size)
    # A frequency of n draws deviates by sqrt(p (1 - p) / n); 5 of them never happen.
    bound = 5 * np.sqrt(chances * (1 - chances) / len(prompts)) + 1 / len(prompts)
    assert np.all(np.abs(counts / len(prompts) - chances) < bound)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        (dict(temperature=-0.1), "--temperature=-0.1"),
        (dict(temperature=1e-45), "--temperature=1e-45"),
        (dict(temperature=1e39), "--temperature=1e+39"),
        (dict(temperature=float("inf")), "--temperature=inf"),
        (dict(temperature=float("nan")), "--temperature=nan"),
        (dict(top_k=-1), "--top_k=-1"),
        (dict(top_p=0.0), "--top_p=0.0"),
        (dict(top_p=1e-45), "--top_p=1e-45"),
        (dict(top_p=1.5), "--top_p=1.5"),
        (dict(top_p=float("nan")), "--top_p=nan"),
        (dict(seed=2**32), "--seed=4294967296"),
    ],
)
def test_wrong_sampling_is_refused_with_its_flag(changes, flag):
    with pytest.raises(InputError) as error:
        Sampling(**changes)
    assert flag in str(error.value)
    assert "must be" in str(error.value)


def test_sampling_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GREEDY.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
