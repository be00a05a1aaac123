# SPDX-License-Identifier: Apache-2.0
"""One training step on one device: what it sums, reports, donates and survives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
)
from jaxllm.step import (
    Setup,
    TrainState,
    compile_eval,
    compile_step,
    gradients,
    init_state,
    prepare,
)
from jaxllm.step.optimizer import make_schedule

ROWS, LENGTH = 8, 16
EPS = float(np.finfo(np.float32).eps)
# A gradient or loss is a sum over all tokens, in another order.
TOLERANCE = 4 * EPS * (ROWS * LENGTH) ** 0.5

# SGD without momentum and with lr 1: the parameters move by minus the gradient.
PLAIN_SGD: dict[str, Any] = dict(
    name="sgd", lr=1.0, schedule="constant", b1=0.0, clip_norm=None
)


def config(
    *, z_loss: float = 0.0, mixed: bool = False, num_experts: int = 0, **optimizer
) -> Config:
    return Config(
        steps=10,
        model=ModelConfig(
            vocab_size=32,
            num_layers=2,
            d_model=16,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            d_ff=24,
            tie_embeddings=True,
            dtype="float32",
            moe=MoEConfig(num_experts=num_experts),
        ),
        data=DataConfig(
            paths=("none",),
            sequence_length=LENGTH,
            batch_size=ROWS,
            cross_document_attention=mixed,
        ),
        loss=LossConfig(z_loss=z_loss, chunk_tokens=48),
        optimizer=OptimizerConfig(**(PLAIN_SGD | optimizer)),
    )


@functools.cache
def built(**changes) -> tuple[Setup, jax.stages.Compiled]:
    setup = prepare(config(**changes), sharding.make_mesh({}, jax.devices()[:1]))
    return setup, compile_step(setup)


@functools.cache
def start() -> Any:
    """Returns initial parameters on the host, the same for every config here."""
    return jax.device_get(init_state(built()[0]).params)


def new_state(setup: Setup) -> TrainState:
    with jax.set_mesh(setup.mesh):
        params = jax.device_put(start(), setup.plan.shardings(start()))
        state = TrainState(
            jnp.zeros((), jnp.int32), params, setup.optimizer.init(params)
        )
        return jax.device_put(state, jax.tree.map(_place, setup.abstract_state))


def _place(leaf):
    return leaf.sharding


def draw_batch() -> dict[str, np.ndarray]:
    """Two documents and padding a row; the numbers of targets differ a lot by row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (ROWS, LENGTH)).astype(np.int32)
    column = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    ends = 2 * np.arange(1, ROWS + 1)[:, None]  # row r has 2 r + 2 tokens
    segments = np.where(column < ends, np.where(column < 5, 1, 2), 0).astype(np.int32)
    return dict(
        tokens=np.where(segments > 0, tokens, 0),
        targets=np.where((segments > 0) & (column != 4), np.roll(tokens, -1, 1), -1),
        segments=segments,
        positions=np.where(column < 5, column, column - 5).astype(np.int32),
    )


def run(batch=None, **changes):
    """Returns the state and the metrics after one step from the same start."""
    setup, step = built(**changes)
    batch = draw_batch() if batch is None else batch
    state, metrics = step(new_state(setup), jax.tree.map(jnp.asarray, batch))
    return jax.device_get(state), jax.device_get(metrics)


def moved(state: TrainState) -> list[np.ndarray]:
    leaves = zip(jax.tree.leaves(start()), jax.tree.leaves(state.params), strict=True)
    return [before - after for before, after in leaves]


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_give_the_gradient_of_the_whole_batch(parts):
    whole, one = run()
    split, many = run(microbatches=parts)
    assert (
        one["num_targets"]
        == many["num_targets"]
        == (draw_batch()["targets"] >= 0).sum()
    )
    for name in ("loss", "objective", "grad_norm"):
        assert many[name] == pytest.approx(one[name], rel=TOLERANCE), name
    for a, b in zip(moved(split), moved(whole), strict=True):
        # The difference of parameters below 1 also has their rounding.
        np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max() + EPS)


def test_statistics_of_experts_are_means_over_tokens_that_have_a_target_or_not():
    batch = draw_batch()
    batch["targets"][: ROWS // 2] = -1
    batch = jax.tree.map(jnp.asarray, batch)
    found = []
    for parts in (1, 2):
        changes: dict[str, Any] = dict(num_experts=4, microbatches=parts)
        setup = prepare(config(**changes), sharding.make_mesh({}, jax.devices()[:1]))
        params = init_state(setup).params
        with jax.set_mesh(setup.mesh):
            take = jax.jit(functools.partial(gradients, setup))
            found.append(jax.device_get(take(params, batch)[1]))
    whole, split = found
    for name in ("loss", "router_entropy"):
        assert split[name] == pytest.approx(whole[name], rel=TOLERANCE), name


def test_the_gradient_is_that_of_the_mean_over_targets_of_all_logits():
    setup, _ = built()
    batch = jax.tree.map(jnp.asarray, draw_batch())
    targets = batch["targets"]
    num_targets = float((targets >= 0).sum())

    @jax.jit
    def gradient(params):
        def loss(params):
            model = setup.model.bind(params)
            tokens, places = batch["tokens"], batch["positions"]
            x_BTD, _ = model(tokens, places, batch["segments"])
            logp_BTV = jax.nn.log_softmax(model.logits(x_BTD))
            picked = jnp.take_along_axis(logp_BTV, targets.clip(0)[..., None], -1)[
                ..., 0
            ]
            return -jnp.where(targets >= 0, picked, 0.0).sum() / num_targets

        return jax.value_and_grad(loss)(params)

    value, expected = gradient(start())
    state, metrics = run()
    assert metrics["loss"] == pytest.approx(float(value), rel=TOLERANCE)
    norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(expected)]
    # The order of leaf_norms is that of leaf_paths.
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(expected)
    ]
    assert setup.leaf_paths == paths
    np.testing.assert_allclose(metrics["leaf_norms"], norms, rtol=8 * TOLERANCE)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(norms), rel=TOLERANCE)
    for got, wanted in zip(moved(state), jax.tree.leaves(expected), strict=True):
        atol = 8 * TOLERANCE * float(np.abs(wanted).max()) + EPS
        np.testing.assert_allclose(got, wanted, atol=atol)


def test_z_loss_is_in_the_objective_and_not_in_the_loss():
    plain, plain_metrics = run()
    heavy, metrics = run(z_loss=0.5)
    assert plain_metrics["objective"] == plain_metrics["loss"]
    assert metrics["loss"] == pytest.approx(plain_metrics["loss"], rel=TOLERANCE)
    assert metrics["objective"] > metrics["loss"] + 0.5  # log(32)**2 / 2 is 6
    assert not np.allclose(moved(heavy)[0], moved(plain)[0])


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("masked", ["targets", "everything"])
def test_a_batch_without_targets_has_no_loss_and_changes_nothing(parts, masked):
    batch = draw_batch()
    batch["targets"] = np.full_like(batch["targets"], -1)
    if masked == "everything":
        batch["segments"] = np.zeros_like(batch["segments"])
    state, metrics = run(batch, microbatches=parts)
    assert metrics["num_targets"] == metrics["grad_norm"] == 0
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["objective"])
    for difference in moved(state):
        assert not np.any(difference)


def test_the_order_of_rows_does_not_matter():
    batch = draw_batch()
    turned = {name: rows[::-1].copy() for name, rows in batch.items()}
    state, metrics = run(turned)
    expected_state, expected = run(batch)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    for a, b in zip(moved(state), moved(expected_state), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max() + EPS)


def test_padding_and_the_text_behind_it_do_not_matter():
    batch = draw_batch()
    noisy = {**batch, "tokens": np.where(batch["segments"] > 0, batch["tokens"], 7)}
    state, metrics = run(noisy)
    expected_state, expected = run(batch)
    assert metrics["loss"] == expected["loss"]
    same = jax.tree.map(np.array_equal, state.params, expected_state.params)
    assert all(jax.tree.leaves(same))


def test_documents_of_a_row_see_each_other_only_if_asked():
    batch = draw_batch()
    apart, _ = run(batch)
    single = {**batch, "segments": np.minimum(batch["segments"], 1)}
    assert run(single)[1]["loss"] != run(batch)[1]["loss"]
    # With cross-document attention the segments are not read at all.
    one, other = run(batch, mixed=True)[1], run(single, mixed=True)[1]
    assert one["loss"] == other["loss"]
    assert one["loss"] != run(batch)[1]["loss"]
    assert int(apart.step) == 1


def test_the_old_state_is_donated():
    setup, step = built()
    state = new_state(setup)
    after, _ = step(state, jax.tree.map(jnp.asarray, draw_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_metrics_report_the_schedule_and_a_step_counts_one():
    changes: dict[str, Any] = dict(name="adamw", lr=0.01, schedule="cosine")
    changes |= dict(warmup_steps=2, b1=0.9, clip_norm=1.0)
    setup, step = built(**changes)
    schedule = make_schedule(setup.config.optimizer, setup.config.steps)
    state, batch = new_state(setup), jax.tree.map(jnp.asarray, draw_batch())
    losses = []
    for number in range(6):
        assert int(state.step) == number
        state, metrics = step(state, batch)
        dtypes = {name: str(leaf.dtype) for name, leaf in metrics.items()}
        assert dtypes.pop("num_targets") == "int32"
        assert set(dtypes.values()) == {"float32"}
        assert float(metrics["lr"]) == pytest.approx(
            float(schedule(number)), rel=4 * EPS
        )
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)  # one batch again and again


def test_grad_norm_is_before_clipping_and_the_update_after():
    free, free_metrics = run()
    clipped, metrics = run(clip_norm=0.01)
    assert metrics["grad_norm"] == pytest.approx(free_metrics["grad_norm"], rel=EPS)
    factor = 0.01 / float(metrics["grad_norm"])
    assert factor < 1
    for a, b in zip(moved(clipped), moved(free), strict=True):
        np.testing.assert_allclose(a, factor * b, atol=EPS)


def test_the_evaluation_sums_what_the_step_averages():
    setup, _ = built()
    params = new_state(setup).params
    batch = jax.tree.map(jnp.asarray, draw_batch())
    sums = jax.device_get(compile_eval(setup)(params, batch))
    nll, num_targets = sums["nll"], sums["num_targets"]
    metrics = run()[1]
    assert num_targets == metrics["num_targets"]
    assert nll / num_targets == pytest.approx(metrics["loss"], rel=TOLERANCE)


def test_a_batch_that_the_mesh_does_not_divide_is_refused_with_its_setting():
    wrong = config(microbatches=2)
    wrong = dataclasses.replace(
        wrong, data=dataclasses.replace(wrong.data, batch_size=24)
    )
    with pytest.raises(sharding.ShardingError) as error:
        prepare(wrong, sharding.make_mesh(dict(fsdp=8)))
    text = str(error.value)
    assert "config.data.batch_size / config.optimizer.microbatches=12" in text
    assert "fsdp=8" in text
    assert "B=8 or 16" in text
