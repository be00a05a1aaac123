# SPDX-License-Identifier: Apache-2.0
"""Trains the first steps of a config on several meshes, and compares their losses.

JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python -m jaxllm.compare_meshes \\
    --config configs/x.py [--meshes "data=8 fsdp=4,tensor=2"] [--steps 20]

Exit status: 0 all agree with one device, 1 one does not, 2 wrong input, which a mesh of
--meshes is that the config does not fit.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.checkpoint.checksum import checksums
from jaxllm.config import Config, InputError, MeshConfig
from jaxllm.data.batches import load_batches
from jaxllm.data.splits import check_vocab, open_splits
from jaxllm.step import Setup, compile_step, init_state, prepare
from sharding import ShardingError

# Largest relative difference of a loss that the order of additions explains.
TOLERANCES = {"float32": 1e-6, "bfloat16": 2.0**-8}

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Course:
    """What the first steps on a mesh gave."""

    parameters: dict[str, str]  # checksum of each before step 0, by path
    losses: np.ndarray
    grad_norms: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a mesh is from one device."""

    mesh: str
    refusal: str = ""  # why the config does not fit it; nothing was run
    changed: tuple[str, ...] = ()  # parameters that differ before step 0
    loss: float = 0.0  # largest relative difference of the steps
    last_loss: float = 0.0  # that of the last step
    grad_norm: float = 0.0

    def agrees(self, tolerance: float) -> bool:
        """Returns whether the mesh trains what one device does."""
        return bool(self.refusal) or (not self.changed and self.loss <= tolerance)


def compare(
    config: Config, meshes: Sequence[Sizes], num_steps: int
) -> Iterator[Comparison]:
    """Yields how each mesh differs from one device.

    Args:
      config: its own mesh does not matter.
      meshes: sizes of the axes that are not 1; their product may be less than the
        number of devices here.
      num_steps: updates on each mesh.

    Raises:
      InputError, sharding.ShardingError: the config cannot run on one device.
    """
    one = follow(_setup(config, {}), num_steps)
    for sizes in meshes:
        try:
            many = follow(_setup(config, sizes), num_steps)
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
            loss=float(losses.max()),
            last_loss=float(losses[-1]),
            grad_norm=float(np.abs(many.grad_norms / one.grad_norms - 1).max()),
        )


def follow(setup: Setup, num_steps: int) -> Course:
    """Trains from the beginning on the config's data; saves nothing."""
    config = setup.config
    splits = open_splits(config.data, "train")
    check_vocab(splits, config.model.vocab_size)
    step, state = compile_step(setup), init_state(setup)
    parameters = checksums(state.params)
    records = []
    with load_batches(
        config.data,
        splits,
        seed=config.seed,
        sharding=setup.abstract_batch["tokens"].sharding,
    ) as batches:
        for _ in range(num_steps):
            state, metrics = step(state, next(batches))
            records.append(jax.device_get((metrics["loss"], metrics["grad_norm"])))
    losses, grad_norms = np.array(records, np.float64).T
    return Course(parameters, losses, grad_norms)


def standard_meshes(num_devices: int) -> list[dict[str, int]]:
    """Returns every axis of the config alone, and every two that share the devices."""
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
    return alone + pairs


def parse_meshes(text: str) -> list[dict[str, int]]:
    """Reads "data=8 fsdp=4,tensor=2".

    Raises:
      InputError: it is not written so.
    """
    try:
        return [
            {axis: int(size) for axis, size in (p.split("=") for p in mesh.split(","))}
            for mesh in text.split()
        ]
    except ValueError as error:
        raise InputError(
            f"--meshes={text!r} must be meshes between spaces, each of axis=size "
            'between commas, such as "data=8 fsdp=4,tensor=2".'
        ) from error


def _setup(config: Config, sizes: Sizes) -> Setup:
    used = int(np.prod(list(sizes.values()), dtype=np.int64))
    devices = jax.devices()
    if used > len(devices):
        raise InputError(
            f"the mesh {_name(sizes)} needs {used} devices and here are "
            f"{len(devices)}; set JAX_NUM_CPU_DEVICES={used}, or give a smaller mesh."
        )
    return prepare(config, sharding.make_mesh(sizes, devices[:used]))


def _name(sizes: Sizes) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def main(argv: list[str]) -> int:
    del argv
    values = absl_flags.FLAGS
    config = flags.config_from_flags()
    tolerance = values.tolerance or TOLERANCES[config.model.dtype]
    meshes = (
        parse_meshes(values.meshes)
        if values.meshes
        else standard_meshes(jax.device_count())
    )
    print(f"{values.steps} steps; relative differences from one device")
    print(f"{'mesh':<36} {'parameters':<11} {'loss':>8} {'last':>8} {'grad_norm':>9}")
    status = flags.FINISHED
    for row in compare(config, meshes, values.steps):
        if row.refusal:
            print(f"{row.mesh:<36} refused: {row.refusal}")
            status = flags.WRONG_INPUT if values.meshes else status
            continue
        same = f"{len(row.changed)} differ" if row.changed else "identical"
        ok = row.agrees(tolerance)
        print(
            f"{row.mesh:<36} {same:<11} {row.loss:>8.1e} {row.last_loss:>8.1e} "
            f"{row.grad_norm:>9.1e}{'' if ok else f'  beyond {tolerance:.1e}'}",
            flush=True,
        )
        status = status if ok else flags.FAILED
    return status


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_string("meshes", None, "such as 'data=8 fsdp=4,tensor=2'")
    absl_flags.DEFINE_integer("steps", 20, "updates on each mesh", lower_bound=1)
    absl_flags.DEFINE_float("tolerance", None, "largest difference of a loss; by dtype")
    flags.run(main)
