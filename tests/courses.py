# SPDX-License-Identifier: Apache-2.0
"""The first steps of a config on any mesh, of which tests compare two.

Rows are packed with documents that can be learned, and have padding: what a mesh must
not mix up shows in the loss.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import sharding
from jaxllm.compare_meshes import train_on
from jaxllm.config import Config, DataConfig
from jaxllm.data.packing import BATCH_NAMES
from jaxllm.step import Setup, TrainState, compile_step, init_state, prepare

ONE_DEVICE = "one device"
STEPS, ROWS, LENGTH, WORDS = 20, 16, 32, 96
DATA = DataConfig(paths=("none",), sequence_length=LENGTH, batch_size=ROWS)
# The project's promise: float32 losses after 20 steps agree to this.
LOSS_TOLERANCE = 1e-6
# A gradient is a sum over tokens in an order that the mesh decides, on parameters that
# carry the roundings of the steps before: a random walk of tokens * steps roundings.
NORM_TOLERANCE = float(np.finfo(np.float32).eps * np.sqrt(ROWS * LENGTH * STEPS))


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the steps on a mesh gave."""

    setup: Setup
    step: jax.stages.Compiled
    initial: dict[str, np.ndarray]  # parameters by path
    state: TrainState  # after the last step
    metrics: dict[str, np.ndarray]  # float64, by step

    @property
    def final(self) -> dict[str, np.ndarray]:
        return parameters(self.setup, self.state)


def make_setup(config: Config, mesh: str) -> Setup:
    """Prepares a config for a mesh such as "fsdp 4 x tensor 2" of simulated devices."""
    sizes = {}
    for part in mesh.split(" x ") if mesh != ONE_DEVICE else ():
        axis, size = part.split()
        sizes[axis] = int(size)
    num_devices = int(np.prod(list(sizes.values()), dtype=np.int64))
    return prepare(config, sharding.make_mesh(sizes, jax.devices()[:num_devices]))


@functools.cache
def train(
    config: Config, mesh: str, start: Callable[[Setup], TrainState] = init_state
) -> Trained:
    """Trains all steps of a config, each mesh once however many tests ask."""
    setup = make_setup(config, mesh)
    step, state = compile_step(setup), start(setup)
    initial = parameters(setup, state)
    batches = (packed_batch(setup, number) for number in range(config.steps))
    state, metrics = train_on(step, state, batches)
    return Trained(setup, step, initial, state, metrics)


def packed_batch(setup: Setup, step: int) -> dict[str, jax.Array]:
    """Returns rows of five or six documents, and padding, where the mesh has them."""
    data, num_words = setup.config.data, setup.config.model.vocab_size
    rng = np.random.default_rng(step)
    shape = (data.batch_size, data.sequence_length)
    batch = {name: np.zeros(shape, np.int32) for name in BATCH_NAMES}
    batch["targets"] -= 1
    for row in range(shape[0]):
        cuts = np.sort(rng.choice(np.arange(2, shape[1]), 5, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
            places, part = np.arange(stop - start), (row, slice(start, stop))
            words = rng.integers(num_words) + rng.integers(1, 4) * places
            batch["tokens"][part] = words % num_words
            batch["segments"][part], batch["positions"][part] = number, places
            batch["targets"][row, start : stop - 1] = words[1:] % num_words
    return jax.device_put(batch, setup.abstract_batch["tokens"].sharding)


def parameters(setup: Setup, state: TrainState) -> dict[str, np.ndarray]:
    """Returns the parameters by path."""
    leaves: list[Any] = jax.device_get(jax.tree.leaves(state.params))
    return dict(zip(setup.leaf_paths, leaves, strict=True))


def changed(one: Trained, many: Trained) -> list[str]:
    """Returns the parameters whose first bits are not the same."""
    assert one.initial.keys() == many.initial.keys()
    pairs = ((path, one.initial[path], many.initial[path]) for path in one.initial)
    return [path for path, a, b in pairs if not np.array_equal(a, b)]


def difference(one: Trained, many: Trained, name: str) -> np.ndarray:
    """Returns how far a metric is from the other's at each step, relative to it."""
    return np.abs(many.metrics[name] / one.metrics[name] - 1)


def check_equal(name: str, one: Trained, many: Trained) -> None:
    """Prints the largest differences; refuses those that roundings do not explain."""
    assert np.ptp(one.metrics["loss"]) > 0.1  # it learns: they could differ
    loss = difference(one, many, "loss")
    norm = difference(one, many, "grad_norm").max()
    print(
        f"\n{name:<42} loss after {len(loss)} steps {loss[-1]:.1e}, largest "
        f"{loss.max():.1e}; gradient norm {norm:.1e}"
    )
    assert loss.max() < LOSS_TOLERANCE
    assert norm < NORM_TOLERANCE
