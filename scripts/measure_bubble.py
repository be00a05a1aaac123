# SPDX-License-Identifier: Apache-2.0
"""Measures which share of a step the stages of a pipeline wait, with made-up times.

    python scripts/measure_bubble.py [--nap_s 0.1]

Compiles the train step of a tiny model on simulated stages, where each layer sleeps:
for a nap in its forward pass, for two in its backward pass. All else takes next to no
time, so that a step is as long as the schedule makes it. Beside it stands the share
that the schedule promises. Exit status: 0 they agree, 1 one does not.
"""

import functools
import os
import time

# Before JAX is imported. Sleeping devices need no core of their own.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from jaxllm.models import mlp
from jaxllm.step import Setup, compile_step, init_state, prepare

# Stages, rounds, microbatches, devices along fsdp inside a stage.
CASES = (
    (2, 1, 4, 1),
    (2, 1, 8, 4),
    (4, 1, 4, 1),
    (4, 1, 8, 2),
    (4, 1, 32, 1),
    (4, 2, 8, 2),
    (8, 1, 8, 1),
)
REPEATS = 3  # the fastest counts: a machine can only be too slow
TOLERANCE = 0.03  # of a step: what is not sleep
LENGTH = 16


def make_setup(stages: int, rounds: int, microbatches: int, fsdp: int) -> Setup:
    """Prepares a model of one layer a group."""
    config = Config(
        steps=REPEATS + 1,
        model=ModelConfig(
            vocab_size=64,
            num_layers=stages * rounds,
            d_model=16,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            d_ff=16,
            dtype="float32",
        ),
        data=DataConfig(
            paths=("none",), sequence_length=LENGTH, batch_size=microbatches * fsdp
        ),
        mesh=MeshConfig(stage=stages, stage_rounds=rounds, fsdp=fsdp),
        optimizer=OptimizerConfig(lr=1e-3, microbatches=microbatches),
    )
    devices = jax.devices()[: stages * fsdp]
    return prepare(config, sharding.make_mesh(config.mesh.sizes, devices))


def make_layers_sleep(nap_s: float) -> None:
    """Makes every MLP sleep, and its gradient twice as long."""

    def sleep(seconds: float, _: jax.Array) -> np.ndarray:
        time.sleep(seconds)
        return np.zeros((1, 1, 1), np.float32)

    def wait(naps: int, x_BTD: jax.Array) -> jax.Array:
        def block(x):
            result = jax.ShapeDtypeStruct((1, 1, 1), x.dtype)
            nap = functools.partial(sleep, naps * nap_s)
            return x + jax.pure_callback(nap, result, x[:1, :1, :1])

        return sharding.local(block, ("BTD",), "BTD")(x_BTD)

    @jax.custom_vjp
    def slow(x_BTD):
        return wait(1, x_BTD)

    slow.defvjp(lambda x: (slow(x), None), lambda _, dx: (wait(2, dx),))
    run = mlp.MLP.__call__
    mlp.MLP.__call__ = lambda self, x_BTD: slow(run(self, x_BTD))


def step_seconds(setup: Setup) -> float:
    """Returns how long the fastest of some steps takes."""
    data = setup.config.data
    row = np.arange(LENGTH, dtype=np.int32)
    batch = {
        name: np.tile(row, (data.batch_size, 1))
        for name in ("tokens", "targets", "positions")
    }
    batch["segments"] = np.ones_like(batch["tokens"])
    batch = jax.device_put(batch, setup.abstract_batch["tokens"].sharding)
    step, state = compile_step(setup), init_state(setup)
    state = jax.block_until_ready(step(state, batch)[0])
    seconds = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        state = jax.block_until_ready(step(state, batch)[0])
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


def main(argv: list[str]) -> int:
    """Prints a row for each schedule."""
    del argv
    nap_s = absl_flags.FLAGS.nap_s
    make_layers_sleep(nap_s)
    print("stages rounds microbatches fsdp  seconds  waits  by schedule")
    status = flags.FINISHED
    for stages, rounds, microbatches, fsdp in CASES:
        setup = make_setup(stages, rounds, microbatches, fsdp)
        assert setup.schedule is not None
        seconds = step_seconds(setup)
        work_s = rounds * microbatches * 3 * nap_s  # of a stage
        waits, bubble = 1 - work_s / seconds, setup.schedule.bubble
        far = not 0 <= waits - bubble <= TOLERANCE
        print(
            f"{stages:>6} {rounds:>6} {microbatches:>12} {fsdp:>4} {seconds:>8.2f} "
            f"{waits:>6.1%} {bubble:>12.1%}{'  differ' if far else ''}",
            flush=True,
        )
        status = flags.FAILED if far else status
    return status


if __name__ == "__main__":
    absl_flags.DEFINE_float("nap_s", 0.1, "seconds of a layer's forward pass")
    flags.run(main)
