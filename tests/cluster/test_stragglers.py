# SPDX-License-Identifier: Apache-2.0
"""A process that keeps the others waiting is named, one that does so once is not."""

import jax
import pytest

import sharding
from jaxllm.cluster.stragglers import PATIENCE, Stragglers


@pytest.fixture
def stragglers(monkeypatch) -> Stragglers:
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # as if it were not alone
    return Stragglers(sharding.make_mesh({"data": 8}))


def test_a_process_that_is_late_for_long_is_named_once(stragglers, caplog):
    for interval in range(4 * PATIENCE):
        stragglers.judge([0.01, 0.01, 0.31], step_s=1.0)
        assert len(caplog.messages) == (interval + 1 >= PATIENCE)
    assert caplog.messages[0].startswith("process 2 is late: before each step it takes")
    assert stragglers.table().splitlines()[1].split() == ["process", "2", "0.3100", "s"]


def test_a_process_that_is_late_now_and_then_or_by_little_is_not_named(
    stragglers, caplog
):
    for interval in range(4 * PATIENCE):
        late = 0.5 if interval % PATIENCE else 0.0
        stragglers.judge([0.01, 0.01 + late, 0.1], step_s=1.0)
    assert caplog.messages == []


def test_two_processes_of_which_one_is_late(stragglers, caplog):
    for _ in range(PATIENCE):
        stragglers.judge([0.5, 0.01], step_s=1.0)
    assert caplog.messages[0].startswith("process 0 is late")


def test_the_median_of_an_interval_arrives_one_interval_later(stragglers):
    known = []
    for interval in ([0.25, 9.0, 0.25], [0.5], [0.5], [0.5]):
        for own_s in interval:
            stragglers.add(own_s)
        stragglers.exchange(step_s=1.0)
        known.append(stragglers.table().split()[-2:])
    # The median of the intervals before: 0.25; then 0.25 and 0.5; then one 0.5 more.
    assert known == [[], ["0.2500", "s"], ["0.3750", "s"], ["0.5000", "s"]]


def test_a_process_alone_compares_itself_with_nobody():
    alone = Stragglers(sharding.make_mesh({"data": 8}))
    for _ in range(9):
        alone.add(1.0)
        alone.exchange(step_s=1.0)
    assert alone.table() == ""
