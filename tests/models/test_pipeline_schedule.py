# SPDX-License-Identifier: Apache-2.0
"""The order of work of a pipeline: complete, possible, and as short as it says."""

import dataclasses

import pytest

from jaxllm.config import ModelConfig, MoEConfig, MoEVariantConfig
from jaxllm.models.pipeline_schedule import Schedule, schedule_stages
from sharding import ShardingError

SCHEDULES = [
    Schedule(stages, rounds, microbatches)
    for stages in (2, 3, 4, 6)
    for rounds in (1, 2, 3, 4)
    for microbatches in (stages, 2 * stages, 4 * stages, stages + 1)
    if rounds == 1 or microbatches % stages == 0
]
MODEL = ModelConfig(
    vocab_size=96,
    num_layers=12,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
)


def tasks(schedule: Schedule) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns tick and stage of each microbatch's turn in each group of layers."""
    found = {}
    for tick in range(schedule.num_ticks):
        for stage in range(schedule.num_stages):
            if task := schedule.task(tick, stage):
                group = task.round * schedule.num_stages + stage
                assert (task.microbatch, group) not in found
                found[task.microbatch, group] = tick, stage
    return found


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_microbatch_visits_every_group_once_and_in_order(schedule):
    found = tasks(schedule)
    groups = schedule.num_stages * schedule.num_rounds
    assert len(found) == schedule.num_microbatches * groups
    for microbatch in range(schedule.num_microbatches):
        visits = [found[microbatch, group] for group in range(groups)]
        # From tick to tick, so that what arrives is used at once and never kept.
        ticks = [tick for tick, _ in visits]
        assert ticks == list(range(ticks[0], ticks[0] + groups))
        assert [s for _, s in visits] == [
            g % schedule.num_stages for g in range(groups)
        ]


def simulated_bubble(schedule: Schedule, tick_s: float) -> float:
    """Returns the share of waiting if a task may begin when its input is there.

    Each stage does its tasks in the order of the schedule; nothing waits for a tick.
    """
    free_s = [0.0] * schedule.num_stages
    ended_s: dict[tuple[int, int], float] = {}
    for (microbatch, group), (_, stage) in sorted(
        tasks(schedule).items(), key=lambda item: item[1]
    ):
        began_s = max(free_s[stage], ended_s.get((microbatch, group - 1), 0.0))
        free_s[stage] = ended_s[microbatch, group] = began_s + tick_s
    busy_s = schedule.num_rounds * schedule.num_microbatches * tick_s
    return 1 - busy_s / max(free_s)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_share_of_waiting_is_that_of_the_formula(schedule):
    p, r, m = schedule.num_stages, schedule.num_rounds, schedule.num_microbatches
    waits = sum(
        schedule.task(tick, stage) is None
        for tick in range(schedule.num_ticks)
        for stage in range(p)
    )
    assert schedule.bubble == (p - 1) / (r * m + p - 1)
    assert waits == pytest.approx(schedule.bubble * schedule.num_ticks * p)
    # No order of tasks is faster: the last stage cannot begin before.
    assert simulated_bubble(schedule, 0.25) == pytest.approx(schedule.bubble)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_no_stage_that_waits_overwrites_an_output(schedule):
    last = schedule.num_stages - 1
    waits = [t for t in range(schedule.num_ticks) if not schedule.task(t, last)]
    assert waits == list(range(last))
    rounds = {}
    for tick in range(last, schedule.num_ticks):
        task = schedule.task(tick, last)
        assert task is not None
        rounds.setdefault(task.microbatch, []).append(task.round)
    assert all(found == list(range(schedule.num_rounds)) for found in rounds.values())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_moves_bring_each_stored_group_to_its_stage_and_round(schedule):
    stages, rounds = schedule.num_stages, schedule.num_rounds
    arrived = {}
    assert len(schedule.moves()) == rounds
    for move in schedule.moves():
        assert sorted(move.targets) == list(range(stages))
        for stage, (target, sent) in enumerate(
            zip(move.targets, move.sent, strict=True)
        ):
            arrived[target, move.received[target]] = stage * rounds + sent
    assert arrived == {(g % stages, g // stages): g for g in range(stages * rounds)}


LEADING = MoEConfig(num_experts=4, variant=MoEVariantConfig(first_dense=2))


@pytest.mark.parametrize(
    ("stages", "rounds", "microbatches", "changes", "said"),
    [
        (5, 1, 8, {}, r"L \(layers\) = 12 is not .* mesh stage=5; .*=10 or 15.*\[1, 2"),
        (2, 4, 8, {}, r"stage=2 \* config.mesh.stage_rounds=4; .*=8 or 16, .*\[1, 3\]"),
        (4, 1, 8, dict(windows=(8, 0)), r"6 periods of 2 layers each .*=8 or 16"),
        (4, 1, 2, {}, r"M \(microbatches\) is less .* stage=4.* use 4 or more"),
        (4, 3, 6, {}, r"M \(microbatches\) .*multiple of mesh stage=4.*use 4 or 8"),
        (2, 1, 8, dict(scan_layers=False), "leaves no L"),
        (2, 1, 8, dict(moe=LEADING), r"first_dense=2 puts layers in front .* stage=2"),
    ],
)
def test_layers_and_microbatches_that_do_not_fit_are_refused(
    stages, rounds, microbatches, changes, said
):
    model = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ShardingError, match=said):
        schedule_stages(stages, rounds, microbatches, model)


def test_one_stage_needs_no_schedule():
    assert schedule_stages(1, 4, 1, MODEL) is None
    assert schedule_stages(3, 2, 6, MODEL) == Schedule(3, 2, 6)
