# SPDX-License-Identifier: Apache-2.0
"""The layers of a model shared out over the mesh axis `stage`.

A tick of `Schedule` is a turn of one scan, run by all stages; their gradient is that of
the scan. Where a stage has no task it computes on what is there, and nobody looks at
the result: its gradient is zero, and it says that it saw no tokens.

What a device sends, for M microbatches, P stages and x bytes of a microbatch that it
has:

- in each of R M + P - 1 ticks its result to the next stage, and backward its gradient
  to the one before: x each;
- the last stage's output to all, each of which has a part of the vocabulary, and the
  gradient of the first one's input: a sum over the stages of M x each;
- for R > 1 rounds, its parameters to the stage that runs them, once a step, and their
  gradients back, in float32. They rest in the order of the layers, as on every mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from jaxllm.models.pipeline_schedule import Schedule

AXIS = "stage"

Where = tuple[jax.Array, jax.Array | None, jax.Array]  # as run_stages takes them
# Runs one layer, or period of layers, on a microbatch: returns x_BTD and statistics.
RunLayer = Callable[[Any, jax.Array, Where], tuple[jax.Array, Any]]


def run_stages(
    schedule: Schedule,
    run_layer: RunLayer,
    remat: Callable[[Callable], Callable] | None,
    layers: Any,
    x_BTD: jax.Array,
    where: Where,
) -> tuple[jax.Array, Any]:
    """Returns the output of all layers, and mean statistics of each microbatch.

    Args:
      schedule: for the size of the mesh axis.
      run_layer: takes a layer's parameters, and x_BTD and where of one microbatch.
      remat: wraps what computes a layer again for its gradient; None keeps everything.
      layers: parameters with a leading dim L, placed by STORAGE.
      x_BTD: all microbatches, as `split` takes them apart.
      where: positions_BT, segments_BT or None, and is_token_BT.
    """

    def stage(layers, x_PMBTD, where):
        layers = _own_layers(schedule, layers)

        def run_turn(turn, x_BTD, where):
            return _run_group(schedule, run_layer, remat, layers, turn, x_BTD, where)

        outs_MBTD, stats_M = _run_ticks(schedule, run_turn, x_PMBTD[0], where)
        return outs_MBTD[None], jax.tree.map(lambda s_M: s_M[None], stats_M)

    first_P, last_P = (
        sharding.constrain(jnp.array(one, x_BTD.dtype), "P")
        for one in np.eye(schedule.num_stages)[[0, -1]]
    )
    x_MBTD, where_M = jax.tree.map(
        lambda x: split(x, schedule.num_microbatches), (x_BTD, where)
    )
    table = sharding.RESIDUAL
    x_PMBTD = sharding.einsum("MBTD,P->PMBTD", x_MBTD, first_P, table=table)
    # Along `data` too, so that replicas add up gradients once a step, not once a tick.
    rows = "data" if "data" in sharding.axes_of("B") else None
    axes = (AXIS, rows) if rows else (AXIS,)
    layers_at, x_at = jax.P(AXIS), jax.P(AXIS, None, rows)
    ins = layers_at, x_at, jax.P(None, rows)
    on_stages = sharding.along(axes, stage, ins, (x_at, jax.P(AXIS)))
    outs_PMBTD, stats_PM = on_stages(layers, x_PMBTD, where_M)
    # The other stages' are what they made along the way.
    outs_MBTD = sharding.einsum("PMBTD,P->MBTD", outs_PMBTD, last_P, table=table)
    outs_BTD = outs_MBTD.swapaxes(0, 1).reshape(x_BTD.shape)
    num_groups = schedule.num_stages * schedule.num_rounds
    return outs_BTD, jax.tree.map(lambda s_PM: s_PM.sum(0) / num_groups, stats_PM)


def split(x: jax.Array, num_parts: int) -> jax.Array:
    """Returns rows in num_parts microbatches: row r is in number r % num_parts.

    The other way round each would be on a few of the devices only.
    """
    b, *rest = x.shape
    return x.reshape(b // num_parts, num_parts, *rest).swapaxes(0, 1)


def _run_ticks(schedule, run_turn, x_MBTD, where):
    here = jax.lax.axis_index(AXIS)
    num_stages = schedule.num_stages
    following = [(p, (p + 1) % num_stages) for p in range(num_stages)]

    def tick(carry, tasks):
        arrived_BTD, outs_MBTD, stats_M = carry
        microbatch, turn, has_task = (column[here] for column in tasks)
        x_BTD = jnp.where(
            (here == 0) & (turn == 0), _pick(x_MBTD, microbatch), arrived_BTD
        )
        positions_BT, segments_BT, is_token_BT = jax.tree.map(
            lambda x: _pick(x, microbatch), where
        )
        where_here = positions_BT, segments_BT, is_token_BT & has_task
        x_BTD, stats = run_turn(turn, x_BTD, where_here)
        # The last round comes last, and what has no task comes before.
        outs_MBTD = jax.lax.dynamic_update_index_in_dim(outs_MBTD, x_BTD, microbatch, 0)
        stats_M = jax.tree.map(
            lambda total_M, s: total_M.at[microbatch].add(jnp.where(has_task, s, 0.0)),
            stats_M,
            stats,
        )
        return (jax.lax.ppermute(x_BTD, AXIS, following), outs_MBTD, stats_M), None

    first = jax.tree.map(lambda x: x[0], (x_MBTD, where))
    stats = jax.eval_shape(lambda: run_turn(0, *first)[1])
    start = (
        jnp.zeros_like(first[0]),
        jnp.zeros_like(x_MBTD),
        jax.tree.map(lambda s: jnp.zeros(len(x_MBTD), s.dtype), stats),
    )
    (_, *results), _ = jax.lax.scan(tick, start, _tasks(schedule))
    return results


def _tasks(schedule: Schedule) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns microbatch, round and whether there is a task, by tick and stage."""
    stages, ticks = range(schedule.num_stages), range(schedule.num_ticks)
    tasks = [[schedule.task(tick, stage) for stage in stages] for tick in ticks]
    return (
        jnp.array([[t.microbatch if t else 0 for t in row] for row in tasks]),
        jnp.array([[t.round if t else 0 for t in row] for row in tasks]),
        jnp.array([[t is not None for t in row] for row in tasks]),
    )


def _run_group(schedule, run_layer, remat, layers, turn, x_BTD, where):
    """Runs the layers of one round; for the gradient, none of them is kept.

    What a scan keeps for each tick must not have the layers in it, which depend on the
    tick: they are taken again from all layers, which do not.
    """
    length = len(jax.tree.leaves(layers)[0]) // schedule.num_rounds
    start = turn * length
    fixed = jax.tree.map(jax.lax.stop_gradient, layers)
    # Only to receive the gradients, a whole round's at once.
    slots = jax.tree.map(
        lambda w: jax.lax.dynamic_slice_in_dim(w, start, length, 0), layers
    )

    def run_slot(x_BTD, slot_and_number):
        slot, number = slot_and_number
        layer = jax.tree.map(
            lambda slot, w: _with_gradient_to(slot, _pick(w, start + number)),
            slot,
            fixed,
        )
        return run_layer(layer, x_BTD, where)

    if remat is None:
        run_slot = jax.checkpoint(run_slot, prevent_cse=False, policy=_all_but_slices)
    else:
        run_slot = remat(run_slot)
    x_BTD, stats = jax.lax.scan(run_slot, x_BTD, (slots, jnp.arange(length)))
    return x_BTD, jax.tree.map(jnp.mean, stats)


@jax.custom_vjp
def _with_gradient_to(slot, value):
    """Returns value, whose gradient is that of slot."""
    del slot
    return value


_with_gradient_to.defvjp(lambda slot, value: (value, None), lambda _, d: (d, None))


def _all_but_slices(primitive, *_, **__) -> bool:
    slices = jax.lax.dynamic_slice_p, jax.lax.squeeze_p, jax.lax.reshape_p
    return primitive not in slices


def _own_layers(schedule: Schedule, layers: Any) -> Any:
    """Returns the layers that this stage runs, round by round."""
    if schedule.num_rounds == 1:
        return layers
    here = jax.lax.axis_index(AXIS)

    def exchange(w):
        w = w.reshape(schedule.num_rounds, -1, *w.shape[1:])
        own = jnp.zeros_like(w)
        for move in schedule.moves():
            group = _pick(w, jnp.array(move.sent)[here])
            if move.targets != tuple(range(schedule.num_stages)):
                group = jax.lax.ppermute(group, AXIS, list(enumerate(move.targets)))
            turn = jnp.array(move.received)[here]
            own = jax.lax.dynamic_update_index_in_dim(own, group, turn, 0)
        return own.reshape(-1, *w.shape[2:])

    return jax.tree.map(exchange, layers)


def _pick(x: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False)
