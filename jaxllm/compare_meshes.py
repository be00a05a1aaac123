# SPDX-License-Identifier: Apache-2.0
"""Trains the first steps of a config on several meshes, and compares the losses.

JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python -m jaxllm.compare_meshes \\
    --config configs/x.py [--meshes "data=8 fsdp=4,tensor=2"] [--steps 20]

Exit status: 0 all agree with one device; 1 one does not; 2 wrong input, also a mesh of
--meshes that the config does not fit.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.checkpoint.checksum import checksums
from jaxllm.cluster.devices import find_devices
from jaxllm.config import Config, MeshConfig, ModelConfig
from jaxllm.data.batches import Batch
from jaxllm.errors import InputError
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.data import open_train_data
from jaxllm.step import Setup, TrainState, compile_step, init_state, prepare
from sharding import ShardingError

# Largest relative difference of a loss by the order of additions alone.
TOLERANCES = {"float32": 1e-6, "bfloat16": 2.0**-8}
# The same with experts: a token whose scores nearly tie is routed to another one.
ROUTED_TOLERANCE = 1e-3

# Axes that are often used together; all threes would be many.
THREES = (
    ("data", "fsdp", "tensor"),
    ("fsdp", "context", "tensor"),
    ("fsdp", "expert", "tensor"),
    ("fsdp", "expert", "context"),
    ("fsdp", "stage", "tensor"),
    ("data", "stage", "context"),
)

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Course:
    """Losses and gradient norms of the first steps on a mesh."""

    parameters: dict[str, str]  # checksum of each before step 0, by path
    losses: np.ndarray
    grad_norms: np.ndarray
    documents: int  # least number in a row


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences of a mesh from one device."""

    mesh: str
    refusal: str = ""  # why the config does not fit it; nothing was run
    changed: tuple[str, ...] = ()  # parameters that differ before step 0
    losses: tuple[float, ...] = ()  # relative difference of each step
    grad_norm: float = 0.0  # largest relative difference of the steps

    @property
    def loss(self) -> float:
        """The largest relative difference of the steps; NaN if one is."""
        return float(np.max(self.losses))

    def num_equal(self, tolerance: float) -> int:
        """Returns the number of steps before the first beyond the tolerance."""
        far = [not loss <= tolerance for loss in self.losses]
        return [*far, True].index(True)

    def agrees(self, tolerance: float) -> bool:
        """Returns whether all steps are within the tolerance, or none was run."""
        same = not self.changed and self.num_equal(tolerance) == len(self.losses)
        return bool(self.refusal) or same


def compare(
    config: Config, meshes: Sequence[Sizes], one: Course
) -> Iterator[Comparison]:
    """Yields the differences of each mesh from one device.

    Args:
      config: its own mesh is ignored.
      meshes: sizes of the axes that are not 1; their product may be less than the
        number of devices here.
      one: what `follow_one` gave.
    """
    num_steps = len(one.losses)
    for sizes in meshes:
        try:
            many = follow(prepare_on(config, sizes), num_steps)
        except (ShardingError, InputError) as error:
            yield Comparison(_name(sizes), refusal=str(error))
            continue
        losses = np.abs(many.losses / one.losses - 1)
        yield Comparison(
            _name(sizes),
            changed=tuple(
                path
                for path, digest in one.parameters.items()
                if many.parameters[path] != digest
            ),
            losses=tuple(losses.tolist()),
            grad_norm=float(np.abs(many.grad_norms / one.grad_norms - 1).max()),
        )


def follow_one(config: Config, num_steps: int) -> Course:
    """Trains on one device.

    Raises:
      InputError, sharding.ShardingError: the config cannot run there.
    """
    return follow(prepare_on(config, {}), num_steps)


def follow(setup: Setup, num_steps: int) -> Course:
    """Trains the first steps on the config's data; saves nothing."""
    step, state = compile_step(setup), init_state(setup)
    parameters = checksums(state.params)
    documents = []

    def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            documents.append(int(batch["segments"].max(1).min()))
            yield batch

    with open_train_data(setup).batches() as batches:
        first = itertools.islice(batches, num_steps)
        _, metrics = train_on(step, state, counted(first))
    losses, grad_norms = metrics["loss"], metrics["grad_norm"]
    return Course(parameters, losses, grad_norms, min(documents))


def train_on(
    step: jax.stages.Compiled, state: TrainState, batches: Iterable[Batch]
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains a step on each batch; returns the last state, and float64 metrics by step.

    Args:
      step: from `compile_step`, without bounds.
      state: donated.
      batches: at least one.
    """
    records = []
    for batch in batches:
        state, metrics = step(state, batch)
        records.append(jax.device_get(metrics))
    return state, {
        name: np.array([record[name] for record in records], np.float64)
        for name in records[0]
    }


def prepare_on(config: Config, sizes: Sizes) -> Setup:
    """Prepares a config for another mesh than its own.

    Raises:
      InputError, sharding.ShardingError: it does not fit that mesh.
    """
    used = math.prod(sizes.values())
    devices = jax.devices()
    if used > len(devices):
        raise InputError(
            f"the mesh {_name(sizes)} needs {used} devices and here are "
            f"{len(devices)}; set JAX_NUM_CPU_DEVICES={used}, or give a smaller mesh."
        )
    mesh = sharding.make_mesh(sizes, devices[:used])
    rounds = config.mesh.stage_rounds if "stage" in sizes else 1
    asked = MeshConfig(**mesh.shape, stage_rounds=rounds)
    return prepare(dataclasses.replace(config, mesh=asked), mesh)


def tolerance_of(model: ModelConfig, asked: float | None = None) -> float:
    """Returns the largest relative difference of a loss that is accepted.

    Args:
      model: decides where nothing is asked.
      asked: by --tolerance; 0 is the same bits.
    """
    if asked is not None:
        if not 0 <= asked < math.inf:
            raise InputError(f"--tolerance={asked} must be a number from 0 on.")
        return asked
    tolerance, moe = TOLERANCES[model.dtype], model.moe
    routed = moe.experts_per_token < moe.num_experts  # all of them need no choice
    return max(tolerance, ROUTED_TOLERANCE) if routed else tolerance


def standard_meshes(num_devices: int) -> list[dict[str, int]]:
    """Returns each axis alone, every pair of axes, and some triples."""
    axes = list(MeshConfig().sizes)
    alone = [{axis: num_devices} for axis in axes]
    if num_devices % 2 or num_devices < 4:
        return alone
    half = num_devices // 2
    pairs = [
        {first: 2, second: half}
        for i, first in enumerate(axes)
        for second in axes[i + 1 :]
    ]
    if num_devices % 4 or num_devices < 8:
        return alone + pairs
    threes = [dict.fromkeys(axes, 2) | {axes[0]: num_devices // 4} for axes in THREES]
    return alone + pairs + threes


def parse_meshes(text: str) -> list[dict[str, int]]:
    """Reads "data=8 fsdp=4,tensor=2".

    Raises:
      InputError: it is not written so.
    """
    try:
        return [
            {
                axis: _size(size)
                for axis, size in (p.split("=") for p in mesh.split(","))
            }
            for mesh in text.split()
        ]
    except ValueError as error:
        raise InputError(
            f"--meshes={text!r} must be meshes between spaces, each of axis=size "
            'between commas, such as "data=8 fsdp=4,tensor=2".'
        ) from error


def _size(text: str) -> int:
    if not 0 < (size := int(text)) < 2**31:
        raise ValueError(text)
    return size


def _name(sizes: Sizes) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def main(argv: list[str]) -> int:
    del argv
    values = absl_flags.FLAGS
    config = flags.config_from_flags()
    use_compilation_cache()
    num_devices = len(find_devices(jax.config.jax_platforms))
    strict = TOLERANCES[config.model.dtype]
    tolerance = tolerance_of(config.model, values.tolerance)
    meshes = (
        parse_meshes(values.meshes) if values.meshes else standard_meshes(num_devices)
    )
    one = follow_one(config, values.steps)
    print(
        f"{values.steps} steps, {one.documents} documents a row or more; relative "
        f"differences from one device; equal: steps until a loss is beyond {strict:.1e}"
    )
    print(f"{'mesh':<32} {'parameters':<11} {'loss':>8} {'equal':>5} {'grad_norm':>9}")
    status = flags.FINISHED
    for row in compare(config, meshes, one):
        if row.refusal:
            print(f"{row.mesh:<32} refused: {row.refusal}")
            status = flags.WRONG_INPUT if values.meshes else status
            continue
        same = f"{len(row.changed)} differ" if row.changed else "identical"
        ok = row.agrees(tolerance)
        print(
            f"{row.mesh:<32} {same:<11} {row.loss:>8.1e} {row.num_equal(strict):>5} "
            f"{row.grad_norm:>9.1e}{'' if ok else f'  beyond {tolerance:.1e}'}",
            flush=True,
        )
        status = status if ok else flags.FAILED
    return status


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_string(
        "meshes", None, "meshes to compare, such as 'data=8 fsdp=4,tensor=2'"
    )
    absl_flags.DEFINE_integer("steps", 20, "training steps on each mesh", lower_bound=1)
    absl_flags.DEFINE_float(
        "tolerance",
        None,
        "largest difference allowed between losses; by dtype if unset",
    )
    flags.run(main)
