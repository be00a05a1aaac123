# SPDX-License-Identifier: Apache-2.0
"""Text from a model: what is drawn, for whom, and when it ends."""

import dataclasses
import functools
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
from jaxllm.inference.sampling import keep_likely, sample_tokens
from jaxllm.models import Model

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


def sample(prompts=PROMPTS, *, max_tokens=6, sampling=GREEDY, end=None):
    """Returns the text of each prompt as rows, with None where it has ended."""
    model, params = built()
    columns = sample_tokens(
        model,
        params,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        end_of_document=end,
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

    width = 12
    positions = np.arange(width, dtype=np.int32)[None]
    for prompt, text in zip(PROMPTS, greedy_text(), strict=True):
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


def test_the_first_tokens_do_not_depend_on_how_many_are_asked_for():
    assert [row[:3] for row in greedy_text()] == sample(max_tokens=3)


def test_a_text_stops_before_its_end_of_document_and_the_others_go_on():
    texts = greedy_text()
    end = texts[0][2]
    ended = sample(end=end)
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


def test_a_low_temperature_approaches_greedy():
    assert sample(sampling=Sampling(temperature=1e-4)) == greedy_text()


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


logit_rows = st.lists(
    st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=9, max_size=9),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.integers(0, 12))
def test_top_k_keeps_the_k_likeliest_and_their_ties(rows, k):
    logits = np.array(rows, np.float32)
    kept = np.asarray(keep_likely(jnp.asarray(logits), Sampling(top_k=k)))
    for before, after in zip(logits, kept, strict=True):
        border = np.sort(before)[::-1][min(k, 9) - 1] if k else -np.inf
        np.testing.assert_array_equal(after, np.where(before < border, -np.inf, before))


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.integers(1, 20).map(lambda i: i / 20))
def test_top_p_keeps_the_fewest_likeliest_that_hold_p(rows, p):
    logits = np.array(rows, np.float32)
    kept = np.isfinite(keep_likely(jnp.asarray(logits), Sampling(top_p=p)))
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
        (dict(temperature=float("inf")), "--temperature=inf"),
        (dict(temperature=float("nan")), "--temperature=nan"),
        (dict(top_k=-1), "--top_k=-1"),
        (dict(top_p=0.0), "--top_p=0.0"),
        (dict(top_p=1.5), "--top_p=1.5"),
        (dict(top_p=float("nan")), "--top_p=nan"),
    ],
)
def test_wrong_sampling_is_refused_with_its_flag(changes, flag):
    with pytest.raises(InputError) as error:
        Sampling(**changes)
    assert flag in str(error.value)
    assert "must be" in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "words"),
    [
        ([[1], []], 3, "prompt 1 has no token"),
        ([[1], [24]], 3, "prompt 1 has token 24"),
        ([[-1]], 3, "prompt 0 has token -1"),
        ([[1]], 0, "--max_tokens=0"),
    ],
)
def test_wrong_prompts_are_refused(prompts, max_tokens, words):
    with pytest.raises(InputError, match=words):
        sample(prompts, max_tokens=max_tokens)


def test_sampling_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GREEDY.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
