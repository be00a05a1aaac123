# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring: exact, on any mesh, refused where the state does not fit."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from jaxllm.checkpoint import Checkpoints
from jaxllm.config import CheckpointConfig
from jaxllm.errors import InputError

ALL = CheckpointConfig(keep_latest=100)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any


def make_state(step: int = 0, width: int = 8, optimizer: str = "adamw") -> State:
    w_DF = jnp.arange(8 * width, dtype=jnp.float32).reshape(8, width) / 7 + step
    params = {
        "blocks": {"w": w_DF, "scale": jnp.full((width,), step, jnp.bfloat16)},
        "embed": jnp.full((16, 4), step, jnp.float32),
    }
    transform = {
        "adamw": optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
        ),
        # Like Muon's: a part of the parameters each, MaskedNode for the others.
        "masked": optax.chain(
            optax.masked(optax.trace(0.9), {"blocks": True, "embed": False}),
            optax.masked(optax.scale_by_adam(), {"blocks": False, "embed": True}),
        ),
        "adafactor": optax.adafactor(1e-3),
        "sgd": optax.sgd(1e-3),
    }[optimizer]
    opt_state = jax.tree.map(lambda x: x + step, transform.init(params))
    return State(jnp.array(step, jnp.int32), params, opt_state)


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def assert_same(left, right):
    """Assert bitwise equality, of dtypes and structure too."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder: Path, *steps: int, config: CheckpointConfig = ALL):
    with Checkpoints(folder, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"step": step})
    return Checkpoints(folder, config)


@pytest.mark.parametrize("optimizer", ["adamw", "masked", "adafactor", "sgd"])
def test_what_is_restored_is_bitwise_what_was_saved(tmp_path, optimizer):
    state = make_state(3, optimizer=optimizer)
    data = {"step": 3, "sources": [{"sha": "ab"}, None], "weights": [0.1, 1e-300]}
    with Checkpoints(tmp_path, ALL) as checkpoints:
        checkpoints.save(3, state, data)
    restored, restored_data = Checkpoints(tmp_path, ALL).restore(3, abstract(state))
    assert_same(restored, state)
    assert restored_data == data


def test_donating_and_changing_what_is_being_saved_does_not_change_the_save(tmp_path):
    state, data = {"w": jnp.zeros(2**20), "step": jnp.zeros((), jnp.int32)}, {"at": [0]}
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnames=("s",))
    with Checkpoints(tmp_path, ALL) as checkpoints:
        with jax.transfer_guard("disallow"):  # as in the training loop
            checkpoints.save(0, state, data)
        data["at"].append(1)
        for _ in range(5):
            state = update(state)
    restored, restored_data = Checkpoints(tmp_path, ALL).restore(0, abstract(state))
    assert_same(restored, jax.tree.map(jnp.zeros_like, state))
    assert restored_data == {"at": [0]}


def test_a_save_on_one_mesh_is_restored_bitwise_on_another(tmp_path):
    devices = np.array(jax.devices())
    if len(devices) < 8:
        pytest.skip("needs JAX_NUM_CPU_DEVICES=8")
    eight = jax.sharding.Mesh(devices[:8].reshape(4, 2), ("fsdp", "tensor"))
    two = jax.sharding.Mesh(devices[2:4], ("fsdp",))
    state = make_state(5)
    with Checkpoints(tmp_path, ALL) as checkpoints:
        checkpoints.save(5, jax.device_put(state, split_rows(state, eight)), {})
    for shardings in (
        split_rows(state, eight),
        split_rows(state, two),
        jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(devices[0]), state),
    ):
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            shardings,
        )
        restored, _ = Checkpoints(tmp_path, ALL).restore(5, target)
        assert_same(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings


def split_rows(tree, mesh):
    def sharding(x):
        return jax.NamedSharding(
            mesh, jax.P(mesh.axis_names) if x.ndim == 2 else jax.P()
        )

    return jax.tree.map(sharding, tree)


def test_parameters_are_restored_without_reading_the_optimizer_state(tmp_path):
    state = make_state(1, width=2**16)
    with Checkpoints(tmp_path, ALL) as checkpoints:
        checkpoints.save(1, state, {})
    before = _bytes_read()
    params = Checkpoints(tmp_path, ALL).restore_params(1, abstract(state.params))
    params_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    assert_same(params, state.params)
    assert _bytes_read() - before < 1.2 * params_bytes


def _bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return metrics[0]["values"][0]["value"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (
            make_state(width=16),
            "params/blocks/w is float32[8, 8] there, and float32[8, 16",
        ),
        (make_state(optimizer="sgd"), "opt_state/1/0/mu/embed is float32[16, 4] there"),
        (
            dataclasses.replace(make_state(), params={"embed": jnp.zeros((16, 4))}),
            "params/blocks/w is float32[8, 8] there, and absent here",
        ),
        (
            dataclasses.replace(
                make_state(), params={**make_state().params, "new": jnp.zeros(3)}
            ),
            "params/new is absent there, and float32[3] here",
        ),
        (
            dataclasses.replace(
                make_state(),
                params=jax.tree.map(
                    lambda x: x.astype(jnp.float32), make_state().params
                ),
            ),
            "params/blocks/scale is bfloat16[8] there, and float32[8] here",
        ),
    ],
    ids=["shape", "optimizer", "missing", "extra", "dtype"],
)
def test_a_state_that_does_not_fit_is_refused_and_named(tmp_path, other, named):
    checkpoints = save_steps(tmp_path, 1)
    with pytest.raises(InputError) as caught:
        checkpoints.restore(1, abstract(other))
    assert named in str(caught.value)
    if "params" in named:
        with pytest.raises(InputError, match="does not fit"):
            checkpoints.restore_params(1, abstract(other.params))


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(InputError, match=r"which has none"):
        Checkpoints(tmp_path / "new", ALL).restore(3, abstract(make_state()))
    with pytest.raises(InputError, match=r"the steps \[1, 2\]"):
        save_steps(tmp_path, 1, 2).restore_params(3, {})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "losses", "kept", "best"),
    [
        (dict(keep_latest=1), [None] * 6, {6}, None),
        (dict(keep_latest=2), [3, 2, 1, 4, 5, 6], {5, 6}, 5),
        (dict(keep_latest=1, keep_every=3), [None] * 6, {3, 6}, None),
        (dict(keep_latest=1, keep_best=True), [3, 1, 2, 4, 5, 6], {2, 6}, 2),
        (dict(keep_latest=1, keep_best=True), [3, 1, 1, 4, 5, 6], {3, 6}, 3),
        (dict(keep_latest=1, keep_best=True), [9, None, 3, None, 5, 6], {3, 6}, 3),
        (dict(keep_latest=2, keep_best=True), [float("nan")] * 6, {5, 6}, None),
        (dict(keep_latest=1, keep_best=True), [None] * 6, {6}, None),
        (
            dict(keep_latest=2, keep_every=2, keep_best=True),
            [1, 3, 4, float("nan"), 5, 6],
            {1, 2, 4, 5, 6},
            1,
        ),
    ],
)
def test_retention_keeps_the_newest_the_multiples_and_the_best(
    tmp_path, config, losses, kept, best
):
    config = CheckpointConfig(every=1, **config)
    for first in (1, 4):  # a resume goes on as if there had been no interruption
        with Checkpoints(tmp_path, config) as checkpoints:
            for step in range(first, first + 3):
                loss = losses[step - 1]
                metrics = None if loss is None else {"eval_loss": float(loss)}
                checkpoints.save(step, {"w": jnp.ones(2)}, {}, metrics=metrics)
    checkpoints = Checkpoints(tmp_path, config)
    assert set(checkpoints.steps()) == kept
    assert checkpoints.best() == best


def test_losses_of_other_held_out_data_are_not_compared(tmp_path):
    evaluations = {1: ("a", 1.0), 2: ("b", 3.0), 3: ("b", 2.0), 4: ("b", 2.5)}
    config = CheckpointConfig(every=1, keep_latest=1, keep_best=True)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, (held_out, loss) in evaluations.items():
            metrics = {"eval_loss": loss}
            data = {"eval": held_out}
            checkpoints.save(step, {"w": jnp.ones(2)}, data, metrics=metrics)
    for each in (checkpoints, Checkpoints(tmp_path, config)):
        assert each.steps() == [3, 4]
        assert each.best() == 3
        assert each.best("a") is None


def test_the_newest_step_stays_until_the_next_is_whole(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=1)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, make_state(step), {})
            while (latest := checkpoints.latest()) != step:
                assert latest == (step - 1 or None)
                time.sleep(0.001)


def test_saving_a_saved_step_again_changes_nothing_and_is_said(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    with caplog.at_level(logging.INFO), Checkpoints(tmp_path, ALL) as checkpoints:
        checkpoints.save(2, make_state(9), {})
    assert "Step 2 is saved already" in caplog.text
    assert_same(checkpoints.restore(2, abstract(make_state()))[0], make_state(2))


def test_saving_below_the_newest_step_is_refused(tmp_path):
    with save_steps(tmp_path, 2, 8) as checkpoints:
        with pytest.raises(InputError, match=r"Step 5 cannot be saved.*has step 8"):
            checkpoints.save(5, make_state(5), {})
    assert checkpoints.steps() == [2, 8]
