# SPDX-License-Identifier: Apache-2.0
"""Steps that are not as they should be: judged, stopped at, skipped, gone back from."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config import AnomalyConfig, Config
from jaxllm.data.batches import batch_of
from jaxllm.errors import InputError
from jaxllm.run import startup
from jaxllm.run.anomalies import MIN_STEPS, WINDOW, Anomalies
from jaxllm.run.data import RunData, open_train_data
from jaxllm.step import compile_step, prepare
from jaxllm.step import compiled as compiled_module
from jaxllm.step.bounds import is_within, select
from jaxllm.train import train

PATHS = ("a", "b")


def values(
    at: int, loss: float, grad_norm: float = 1.0, num_targets: int = 1
) -> dict[str, Any]:
    norms = np.array([grad_norm, 0.0])
    return {
        "step": at,
        "loss": loss,
        "objective": loss,
        "grad_norm": grad_norm,
        "leaf_norms": norms,
        "num_targets": num_targets,
    }


def judge(config: AnomalyConfig, losses: list[float], reload_at=()) -> list:
    """Returns bounds and verdict of each step, with a save and a resume before some."""
    anomalies, seen = Anomalies(config, PATHS), []
    for at, loss in enumerate(losses):
        if at in reload_at:
            saved = json.loads(json.dumps(anomalies.to_json()))
            anomalies = Anomalies(config, PATHS)
            anomalies.go_to(saved)
        bounds = anomalies.bounds(at)
        seen.append((bounds, anomalies.judge(values(at, loss), batch=at)))
    return [*seen, anomalies.to_json()]


@given(
    losses=st.lists(
        st.floats(0.5, 2.0) | st.just(9.0) | st.just(math.nan), max_size=60
    ),
    reload_at=st.sets(st.integers(0, 60)),
    policy=st.sampled_from(["stop", "skip", "rewind"]),
)
def test_a_resumed_run_judges_as_one_that_was_never_stopped(losses, reload_at, policy):
    config = AnomalyConfig(policy=policy, budget=3, spike_factor=2.0)
    assert judge(config, losses) == judge(config, losses, reload_at)


def test_the_bounds_are_of_the_median_up_to_the_step_before_the_last():
    config = AnomalyConfig(spike_factor=3.0)
    losses = [float(i) for i in range(1, 2 * WINDOW)]
    seen = judge(config, losses)[:-1]
    for at, ((loss_bound, norm_bound), verdict) in enumerate(seen):
        known = losses[max(0, at - 1 - WINDOW) : max(0, at - 1)]
        enough = len(known) >= MIN_STEPS
        assert loss_bound == (3.0 * np.median(known) if enough else math.inf)
        assert norm_bound == (3.0 if enough else math.inf)
        assert verdict is None


def test_a_spike_is_not_part_of_the_median_it_is_judged_by():
    config = AnomalyConfig(policy="skip", spike_factor=2.0)
    seen = judge(config, [1.0] * 20 + [2.5] * 10)
    assert [verdict is not None for _, verdict in seen[:-1]] == 20 * [False] + 10 * [
        True
    ]
    assert seen[20][1].what == (
        "step 20: the loss 2.5 is above 2, which is config.anomaly.spike_factor=2.0 "
        "times the median"
    )


def test_a_step_without_targets_is_no_anomaly_and_in_no_median():
    config = AnomalyConfig(policy="skip", spike_factor=2.0)
    anomalies = Anomalies(config, PATHS)
    for at in range(MIN_STEPS):
        assert anomalies.judge(values(at, 1.0), batch=at) is None
    before = anomalies.to_json()
    nothing = values(MIN_STEPS, math.nan, 0.0, num_targets=0)
    assert anomalies.judge(nothing, batch=MIN_STEPS) is None
    assert anomalies.to_json() == before
    bounds = jnp.array(anomalies.bounds(MIN_STEPS + 1), jnp.float32)
    as_arrays = {name: jnp.asarray(value) for name, value in nothing.items()}
    assert is_within(bounds, as_arrays)
    # Its gradient is judged all the same, and with targets its loss is.
    assert not is_within(bounds, {**as_arrays, "grad_norm": jnp.float32(math.nan)})
    assert not is_within(bounds, {**as_arrays, "num_targets": jnp.int32(1)})
    bad = values(MIN_STEPS + 1, math.nan, math.inf, num_targets=0)
    assert anomalies.judge(bad, batch=MIN_STEPS + 1) is not None


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_the_budget_is_of_the_last_thousand_steps(policy):
    anomalies = Anomalies(AnomalyConfig(policy=policy, budget=2), PATHS)
    actions = {}
    for at in (5, 900, 1004, 1005, 1500):
        anomaly = anomalies.judge(values(at, math.nan, math.nan), batch=at)
        assert anomaly is not None
        actions[at] = anomaly.action
    assert actions == {5: policy, 900: policy, 1004: "stop", 1005: policy, 1500: "stop"}
    assert "config.anomaly.budget=2 is spent, by the steps [900, 1005]" in anomaly.what
    assert "not finite in 1 of 2 parameters, first in a" in anomaly.what


@given(left_out=st.sets(st.integers(0, 50)), start=st.integers(0, 60))
def test_steps_have_all_batches_that_are_not_left_out_in_their_order(left_out, start):
    wanted = [batch for batch in range(200) if batch not in left_out]
    found = [batch_of(at, sorted(left_out)) for at in range(start, 100)]
    assert found == wanted[start:100]


@pytest.mark.parametrize("factor", [1.0, 0.5, math.inf, math.nan])
def test_a_factor_that_makes_no_sense_is_refused(factor):
    with pytest.raises(InputError, match=r"config\.anomaly\.spike_factor=.* above 1"):
        AnomalyConfig(spike_factor=factor)


def test_a_step_that_has_no_effect_still_has_its_place_in_the_schedule():
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda n: n))
    params = {"w": jnp.ones(3)}
    old: Any = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        _, new = optimizer.update(params, old, params)
    kept = select(jnp.array(False), new, old)
    assert int(kept[1].count) == 1 and int(kept[0].count) == 0
    np.testing.assert_array_equal(kept[0].mu["w"], old[0].mu["w"])
    taken = select(jnp.array(True), new, old)
    jax.tree.map(np.testing.assert_array_equal, taken, new)


Poison = Callable[[list[int], float], None]


@pytest.fixture
def poison(tiny, monkeypatch) -> Iterator[Poison]:
    """Makes the loss of some batches a multiple of what it is, in every run."""
    honest = compiled_module._loss_sums
    setup = prepare(tiny(), sharding.make_mesh({"fsdp": 8}))
    with open_train_data(setup).batches() as batches:
        sums = [int(next(batches)["tokens"].sum()) for _ in range(40)]

    def spoil(numbers: list[int], factor: float):
        bad = [sums[number] for number in numbers]

        def loss_sums(setup, params, batch):
            found = honest(setup, params, batch)
            is_bad = jnp.isin(batch["tokens"].sum(), jnp.array(bad, jnp.int32))
            scale = jnp.where(is_bad, jnp.float32(factor), jnp.float32(1))
            return {name: value * scale for name, value in found.items()}

        monkeypatch.setattr(compiled_module, "_loss_sums", loss_sums)
        compiled = {}

        def compile_once(setup, options):  # it is the same for all runs of a test
            policy = setup.config.anomaly.policy
            if policy not in compiled:
                compiled[policy] = compile_step(setup, options)
            return compiled[policy]

        monkeypatch.setattr(startup, "compile_step", compile_once)

    yield spoil


def states(workdir: Path, config: Config) -> dict[int, Any]:
    """Returns every saved state."""
    setup = prepare(config, sharding.make_mesh({"fsdp": 8}))
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as saved:
        return {
            at: jax.device_get(saved.restore(at, setup.abstract_state)[0])
            for at in saved.steps()
        }


def assert_same(one: Any, other: Any):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def losses(workdir: Path) -> dict[int, float | None]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def configured(tiny, policy: str, **more) -> Config:
    return tiny(
        {
            "steps": 8,
            "eval.every": 0,
            "checkpoint.every": 2,
            "checkpoint.keep_latest": 20,
            "logging.tensorboard": False,
            "anomaly.policy": policy,
            **{name.replace("__", "."): value for name, value in more.items()},
        }
    )


def test_a_skipped_step_changes_nothing_but_the_time(tiny, poison, tmp_path):
    poison([3], math.nan)
    config = configured(tiny, "skip", checkpoint__every=1)
    records = list(train(config, tmp_path))
    saved = states(tmp_path, config)
    leaves = zip(*map(jax.tree.leaves_with_path, (saved[3], saved[4])), strict=True)
    moved = [
        (jax.tree_util.keystr(path), int(new - old))
        for (path, old), (_, new) in leaves
        if not np.array_equal(old, new)
    ]
    # The number of the step and the schedule's count: not Adam's, nor any array.
    assert moved == [(".step", 1), (".opt_state[3].count", 1)]
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert [r["skipped_total"] for r in records] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert losses(tmp_path)[3] is None
    assert math.isfinite(records[-1]["loss"])
    embeddings = [saved[at].params["embedding"] for at in range(1, 9)]
    pairs = itertools.pairwise(embeddings)
    stood_still = [at for at, (a, b) in enumerate(pairs, 1) if np.array_equal(a, b)]
    assert stood_still == [3]


@pytest.mark.parametrize(
    ("policy", "factor", "batch", "moments"),
    [
        ("skip", math.nan, 3, (1, 3, 4)),
        ("rewind", math.nan, 3, (2, 3, 5)),
        pytest.param("skip", 40.0, 19, (18, 19, 21), marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_a_run_ends_with_the_same_bits(
    tiny, poison, tmp_path, policy, factor, batch, moments
):
    poison([batch, batch + 2], factor)
    spike = {} if math.isnan(factor) else {"anomaly.spike_factor": 4.0, "steps": 24}
    config = configured(tiny, policy, **spike)
    whole, killed = tmp_path / "whole", []
    for record in train(config, whole):
        if record["step"] in moments:
            unfinished = shutil.ignore_patterns("*.orbax-checkpoint-tmp")
            folder = tmp_path / f"{record['step']}-{len(killed)}"
            killed.append(shutil.copytree(whole, folder, ignore=unfinished))
    assert len(killed) >= len(moments)
    end = states(whole, config)[config.steps]
    for folder in killed:
        for _ in train(config, folder):
            pass
        assert_same(states(folder, config)[config.steps], end)
        assert losses(folder) == losses(whole)


def test_rewound_a_run_is_the_one_whose_data_never_had_the_batch(
    tiny, poison, tmp_path, monkeypatch, caplog
):
    poison([3, 5, 6], math.nan)
    config = configured(tiny, "rewind")
    records = list(train(config, tmp_path / "rewound"))
    assert "step 3: the loss is nan" in caplog.text
    assert "rewinds, and leaves batch 3 out" in caplog.text
    assert [r["left_out_total"] for r in records][-1] == 3
    assert list(losses(tmp_path / "rewound")) == list(range(8))

    batches = RunData.batches

    def without(data: RunData, start: int, left_out: list[int]):
        return batches(data, start, [*left_out, 3, 5, 6])

    monkeypatch.setattr(RunData, "batches", without)
    list(train(configured(tiny, "stop"), tmp_path / "without"))
    one, other = (states(tmp_path / name, config) for name in ("rewound", "without"))
    assert_same(one[8], other[8])
    assert losses(tmp_path / "rewound") == losses(tmp_path / "without")


def test_a_spent_budget_stops_the_run_and_nothing_bad_is_saved(tiny, poison, tmp_path):
    poison(list(range(3, 30)), math.nan)
    config = configured(tiny, "rewind", anomaly__budget=2)
    with pytest.raises(FloatingPointError, match=r"config\.anomaly\.budget=2 is spent"):
        list(train(config, tmp_path))
    for state in states(tmp_path, config).values():
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_spike_stops_the_run_if_it_is_to(tiny, poison, tmp_path):
    poison([20], 40.0)
    config = configured(tiny, "stop", steps=24, anomaly__spike_factor=4.0)
    with pytest.raises(FloatingPointError, match=r"step 20: the loss .* is above"):
        list(train(config, tmp_path))
    assert max(states(tmp_path, config)) == 20
