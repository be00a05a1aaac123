# SPDX-License-Identifier: Apache-2.0
"""The steps between two log records: metrics read late, and their times."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.records.interval import Interval, LateMetrics

SCALARS = ("loss", "objective", "grad_norm", "lr", "num_targets")


@pytest.fixture
def clock(monkeypatch):
    """A clock in seconds, which stands still until it is set."""
    now_s = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    return now_s


def test_late_metrics_come_one_step_late_each_exactly_once():
    late, seen = LateMetrics(), []
    compute = jax.jit(lambda x: {"loss": x, "norms": x + jnp.ones(3)})
    with jax.transfer_guard("disallow"):
        for step in range(5):
            values = compute(jax.device_put(np.float32(step)))
            now_s = time.perf_counter()
            seen.append(late.push(step, values, began_at_s=now_s, wait_s=step / 8))
            if step == 2:
                seen.append(late.flush())
        seen += [late.flush(), late.flush()]
    assert [r and r["step"] for r in seen] == [None, 0, 1, 2, None, 3, 4, None]
    for record in filter(None, seen):
        assert record["loss"] == record["step"]
        assert type(record["loss"]) is float and record["norms"].shape == (3,)
        assert record["wait_s"] == record["step"] / 8


def test_step_time_excludes_what_came_between_a_flush_and_the_next_step(monkeypatch):
    now_s, loss = 100.0, {"loss": jnp.ones(())}
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    late, read = LateMetrics(), []
    for step in range(4):
        if step == 2:
            read.append(late.flush())
            now_s += 50  # an evaluation
        began_at_s = now_s
        now_s += 2
        read.append(late.push(step, loss, began_at_s=began_at_s))
    read.append(late.flush())
    step_s = [record["step_s"] for record in read if record]
    assert len(step_s) == 4
    assert sum(step_s) == 4 * 2
    assert max(step_s) <= 2 * 2  # of two steps, the second is read when it is given


def metrics_of(step: int) -> dict[str, jax.Array]:
    names = (*SCALARS, "router_load")
    return {"leaf_norms": jnp.ones(2)} | {n: jnp.float32(step) for n in names}


def test_a_log_record_has_means_of_the_times_and_the_metrics_of_the_last_step(clock):
    interval = Interval(mfu=lambda tokens_per_s: tokens_per_s / 100)
    for step in range(3):
        with interval.data_wait():
            clock[0] += step  # seconds for the batch
        clock[0] += 2
        if values := interval.push(step, metrics_of(step)):
            interval.add(values)
    values = interval.flush()
    assert values is not None
    interval.add(values)
    assert interval.first_step == 0
    record = interval.end({"skipped": 1}, goodput=0.5)
    assert {record[name] for name in (*SCALARS, "router_load")} == {2.0}
    assert record["data_wait_s"] == (0 + 1 + 2) / 3
    assert record["step_s"] == (2 + 1 + 2 + 2 + 2) / 3  # all of the time, by step
    targets = (0 + 1 + 2) / 3  # of a step; a batch may have padding
    assert record["tokens_per_s"] == targets / record["step_s"]
    assert record["mfu"] == record["tokens_per_s"] / 100
    assert (record["skipped"], record["goodput"]) == (1, 0.5)
    assert "leaf_norms" not in record and "memory_bytes" not in record


def test_the_next_interval_has_the_steps_after_the_record_only(clock):
    interval = Interval(mfu=lambda tokens_per_s: None)
    for step, took_s in enumerate((1.0, 5.0)):
        with interval.data_wait():
            clock[0] += took_s
        interval.push(step, metrics_of(step))
        values = interval.flush()
        assert values is not None
        interval.add(values)
        record = interval.end({}, goodput=1.0)
        assert record["step_s"] == took_s
        assert math.isnan(record["mfu"])


def test_a_process_has_its_own_time_from_one_wait_for_the_devices_to_the_next(clock):
    interval = Interval(mfu=lambda tokens_per_s: None)
    clock[0] += 3
    assert interval.own_s == 3
    interval.push(0, metrics_of(0))
    assert interval.own_s == 0
    clock[0] += 2
    interval.flush()  # before an evaluation, whose time is the process's own too
    assert interval.own_s == 2
