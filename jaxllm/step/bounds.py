# SPDX-License-Identifier: Apache-2.0
"""Bounds of the loss and gradient norm of a step, beyond which it is skipped."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

NAMES = ("objective", "grad_norm")  # the metrics that have a bound, in this order


def abstract_bounds(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """Returns the shape of bounds as the compiled step takes them."""
    everywhere = jax.NamedSharding(mesh, jax.P())
    return jax.ShapeDtypeStruct((len(NAMES),), jnp.float32, sharding=everywhere)


def place_bounds(bounds: tuple[float, ...], mesh: jax.sharding.Mesh) -> jax.Array:
    """Returns bounds on all devices, by explicit transfers."""
    # `device_put` onto the devices of several processes would compare the processes'
    # values first, by a collective of its own.
    abstract = abstract_bounds(mesh)
    place = abstract.sharding
    assert place is not None
    devices = list(place.addressable_devices)
    values = np.array(bounds, abstract.dtype)
    parts = jax.device_put([values] * len(devices), devices)
    return jax.make_array_from_single_device_arrays(abstract.shape, place, parts)


def is_within(bounds: jax.Array, metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Returns whether the metrics of a step are finite and not above their bounds.

    Without targets there is no objective to judge.
    """
    values = jnp.stack([metrics[name] for name in NAMES])
    unjudged = jnp.array([name == "objective" for name in NAMES])
    unjudged &= metrics["num_targets"] == 0
    return (unjudged | (jnp.isfinite(values) & (values <= bounds))).all()


def select(taken: jax.Array, new: Any, old: Any) -> Any:
    """Returns new if taken; else old, with the count of the learning rate's schedule.

    A skipped step is a step of the schedule. Adam's own count, which corrects the bias
    of moments, does not advance, as the moments do not.
    """

    def is_time(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda n, o: n if is_time(n) else jax.lax.select(taken, n, o),
        new,
        old,
        is_leaf=is_time,
    )
