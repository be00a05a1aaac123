# SPDX-License-Identifier: Apache-2.0
"""Which microbatch and which layers each stage of a pipeline has at each tick.

The layers are split into stages * rounds groups of equal size. Stage p has groups p,
p + stages, p + 2 stages and so on: a microbatch goes around the stages `rounds` times.
In each tick all stages run one group, then each hands its result to the next one.
Microbatches go around `stages` at a time: when the last of these has entered, the
first one has come around.

A stage works for rounds * microbatches ticks. It idles for the stages - 1 ticks in
which others have begun and it has not, or the other way round: the pipeline bubble.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
Clusters" (arXiv:2104.04473), section 2.2, but with all forward passes before the
backward passes, as in Huang et al., "GPipe" (arXiv:1811.06965).
"""

import dataclasses
import math

from jaxllm.config import ModelConfig
from jaxllm.config.checks import divisors, neighbours
from sharding import ShardingError


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage does in a tick."""

    microbatch: int
    round: int  # which of its groups of layers


@dataclasses.dataclass(frozen=True)
class Move:
    """One group of layers that each stage sends to another, or keeps."""

    targets: tuple[int, ...]  # by stage: who gets it
    sent: tuple[int, ...]  # by stage: which of its groups as stored
    received: tuple[int, ...]  # by stage: which round the group is for that it gets


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order of work of a pipeline."""

    num_stages: int
    num_rounds: int  # times that a microbatch goes around the stages
    num_microbatches: int  # a multiple of num_stages if num_rounds is above 1

    @property
    def num_ticks(self) -> int:
        """Ticks from the first task of the first stage to the last one's last."""
        return self.num_rounds * self.num_microbatches + self.num_stages - 1

    @property
    def bubble(self) -> float:
        """The share of all ticks in which a stage has no task."""
        return (self.num_stages - 1) / self.num_ticks

    def task(self, tick: int, stage: int) -> Task | None:
        """Returns what a stage does in a tick; None if it idles."""
        number = tick - stage  # of this stage's tasks
        if not 0 <= number < self.num_rounds * self.num_microbatches:
            return None
        if self.num_rounds == 1:
            return Task(number, 0)
        rest, member = divmod(number, self.num_stages)
        party, turn = divmod(rest, self.num_rounds)
        return Task(party * self.num_stages + member, turn)

    def moves(self) -> list[Move]:
        """Returns how layers stored in order come to their stages: a move a round.

        Group g is stored by stage g // rounds and run by stage g % stages. In a move
        every stage sends one group and gets one.
        """
        stages, rounds = self.num_stages, self.num_rounds
        # No stage may have, or get, two groups of one move. Neighbours in storage and
        # groups `stages` apart differ in g % rounds, until that repeats.
        repeats = math.lcm(stages, rounds)
        moves = []
        for number in range(rounds):
            groups = [
                next(
                    g
                    for g in range(stage * rounds, (stage + 1) * rounds)
                    if (g + g // repeats) % rounds == number
                )
                for stage in range(stages)
            ]
            got = {group % stages: group for group in groups}
            moves.append(
                Move(
                    targets=tuple(group % stages for group in groups),
                    sent=tuple(group % rounds for group in groups),
                    received=tuple(got[stage] // stages for stage in range(stages)),
                )
            )
        return moves


def schedule_stages(
    num_stages: int, num_rounds: int, num_microbatches: int, model: ModelConfig
) -> Schedule | None:
    """Returns the schedule of a mesh with so many stages; None for one stage.

    Raises:
      ShardingError: the layers or the microbatches do not fit the stages.
    """
    if num_stages == 1:
        return None
    where = f"mesh stage={num_stages}"
    if num_rounds > 1:
        where += f" * config.mesh.stage_rounds={num_rounds}"
    if not model.scan_layers:
        raise ShardingError(
            f"config.model.scan_layers=False leaves no L (layers) for {where} to "
            "cut; use config.model.scan_layers=True, or stage=1."
        )
    if leading := len(model.leading):
        raise ShardingError(
            f"config.model.moe.variant.first_dense={leading} puts layers in front of "
            f"those that {where} cuts, and no stage has them; use stage=1, with "
            "expert, fsdp or tensor instead."
        )
    groups, period = num_stages * num_rounds, len(model.period)
    periods = model.num_layers // period
    if periods % groups:
        fits = [d for d in divisors(periods) if d % num_rounds == 0]
        each = f" periods of {period} layers each" if period > 1 else ""
        layers = neighbours(model.num_layers, groups * period)
        stages = f", or stage one of {[d // num_rounds for d in fits]}" if fits else ""
        raise ShardingError(
            f"config.model.num_layers={model.num_layers}: L (layers) = {periods}{each} "
            f"is not a multiple of {where}; use config.model.num_layers={layers}"
            f"{stages}."
        )
    setting = f"config.optimizer.microbatches={num_microbatches}: M (microbatches)"
    if num_microbatches < num_stages:
        raise ShardingError(
            f"{setting} is less than {where}, and stages would wait most of the time; "
            f"use {num_stages} or more, or stage at most {num_microbatches}."
        )
    if num_rounds > 1 and num_microbatches % num_stages:
        raise ShardingError(
            f"{setting} is not a multiple of mesh stage={num_stages}, as "
            f"config.mesh.stage_rounds={num_rounds} needs; use "
            f"{neighbours(num_microbatches, num_stages)}, or stage one of "
            f"{divisors(num_microbatches)}, or config.mesh.stage_rounds=1."
        )
    return Schedule(num_stages, num_rounds, num_microbatches)
