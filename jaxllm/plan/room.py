# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits into the memory that there is, before XLA finds out."""

import math
from typing import Any

import jax

from jaxllm.cluster.memory import check_room, device_bytes, host_bytes
from jaxllm.plan.budget import num_parameters
from jaxllm.step import Setup

_REMEDY = (
    "use a smaller config.model, config.data.batch_size or config.data.sequence_length,"
    " or more devices along config.mesh.fsdp"
)


def bytes_of_a_device(tree: Any) -> int:
    """Returns the bytes that each device has of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check_training(setup: Setup) -> None:
    """Refuses a run whose state, gradients and batch alone do not fit.

    Activations are not counted: they depend on what XLA fuses.

    Raises:
      InputError: with the bytes needed and the bytes there.
    """
    state = setup.abstract_state
    needed = (state, state.params, setup.abstract_batch)  # gradients are like params
    _check(setup, "state, gradients and batch", bytes_of_a_device(needed))


def check_parameters(setup: Setup) -> None:
    """Refuses a model whose parameters alone do not fit; raises the same."""
    params = setup.abstract_state.params
    _check(setup, "the parameters", bytes_of_a_device(params))


def check_step(setup: Setup, step: jax.stages.Compiled) -> None:
    """Refuses a compiled step whose own arrays do not fit beside the state.

    Args:
      setup: of the run, whose state is on the devices.
      step: donates the state; what it makes besides are activations and gradients.

    Raises:
      InputError: with the bytes needed and the bytes there.
    """
    found = step.memory_analysis()
    if found is None:
        return
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    _check(setup, "the step", found.temp_size_in_bytes + new, used=True)


def _check(setup: Setup, what: str, each: int, *, used: bool = False) -> None:
    """Compares bytes of each device with what there is, or with what is left of it."""
    model = f"config.model of {num_parameters(setup.config.model):,} parameters"
    device, num_devices = setup.mesh.local_devices[0], len(setup.mesh.local_devices)
    if (there := device_bytes(device)) is None:  # it shares the memory of its host
        of_all = f"{what} of {model} on {num_devices} device(s) of this machine"
        check_room(of_all, each * num_devices, host_bytes(), _REMEDY)
    else:
        there -= device.memory_stats()["bytes_in_use"] if used else 0
        check_room(f"{what} of {model}, on each device,", each, there, _REMEDY)
