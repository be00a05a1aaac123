# SPDX-License-Identifier: Apache-2.0
"""A config on a mesh: shapes, shardings and functions, without arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sharding
from jaxllm.config import Config
from jaxllm.data.packing import BATCH_NAMES
from jaxllm.models import Model
from jaxllm.models.pipeline_schedule import Schedule, schedule_stages
from jaxllm.step.loss import Loss
from jaxllm.step.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes."""

    step: jax.Array  # int32 []: updates done
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config on a mesh: shapes, shardings and functions, without arrays.

    Attributes:
      schedule: of the pipeline stages, if the mesh has any.
      abstract_state: `jax.ShapeDtypeStruct` with shardings: the target of a restore.
      abstract_batch: the same for a batch.
    """

    config: Config
    mesh: jax.sharding.Mesh
    model: Model
    plan: sharding.Plan
    schedule: Schedule | None
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def leaf_paths(self) -> list[str]:
        """The parameters' paths, in the order of `jax.tree.leaves`."""
        return [row.path for row in self.plan.rows]

    def loss(self, letters: str) -> Loss:
        """Returns the loss of the config, for output weights of these letters."""
        config = self.config
        return Loss(
            letters,
            config.model.logit_softcap,
            config.loss,
            config.kernels.cross_entropy,
        )


def prepare(config: Config, mesh: jax.sharding.Mesh) -> Setup:
    """Plans and checks the sharding of the state; touches no device.

    Raises:
      sharding.ShardingError: lists everything on which mesh and config disagree.
    """
    setting = "config.data.sequence_length"
    sharding.check_length(setting, config.data.sequence_length, mesh)
    schedule = schedule_stages(
        mesh.shape["stage"],
        config.mesh.stage_rounds,
        config.optimizer.microbatches,
        config.model,
    )
    model = Model(config.model, config.kernels)
    plan = sharding.plan(model.abstract, model.letters, mesh, dims=_dims(config))
    optimizer = make_optimizer(
        config.optimizer,
        config.steps,
        _nest(model.letters),
        balance_step=config.model.moe.balance_weight,
    )
    state = jax.eval_shape(lambda params: _new_state(params, optimizer), model.abstract)
    batch_sharding = sharding.named_sharding("BT", sharding.COMPUTE, mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding)
    return Setup(
        config=config,
        mesh=mesh,
        model=model,
        plan=plan,
        schedule=schedule,
        optimizer=optimizer,
        abstract_state=jax.tree.map(
            lambda leaf, place: leaf.update(sharding=place),
            state,
            plan.shardings(state),
        ),
        abstract_batch=dict.fromkeys(BATCH_NAMES, row),
    )


def init_state(setup: Setup) -> TrainState:
    """Returns the initial state, bitwise the same on every mesh."""

    def init(key):
        return _new_state(setup.model.init(key), setup.optimizer)

    # Under automatic axes every device makes its own part of the random numbers; the
    # explicit mode would make all of them everywhere first.
    placed = jax.sharding.auto_axes(init, out_sharding=specs_of(setup.abstract_state))
    with jax.set_mesh(setup.mesh):
        return jax.jit(placed)(jax.random.key(setup.config.seed))


def state_of(setup: Setup, params: Any) -> TrainState:
    """Returns the state of step 0 with these parameters, placed as the setup says."""

    def make(params):
        return _new_state(params, setup.optimizer)

    placed = jax.sharding.auto_axes(make, out_sharding=specs_of(setup.abstract_state))
    with jax.set_mesh(setup.mesh):
        return jax.jit(placed, donate_argnums=0)(params)


def _new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _dims(config: Config) -> dict[str, tuple[str, int]]:
    rows = config.data.batch_size // config.optimizer.microbatches
    setting = "config.data.batch_size / config.optimizer.microbatches"
    return {
        "B": (setting, rows),
        "T": ("config.data.sequence_length", config.data.sequence_length),
        "N": ("config.model.num_heads", config.model.num_heads),
        "K": ("config.model.num_kv_heads", config.model.num_kv_heads),
        "F": ("config.model.d_ff", config.model.d_ff_expert),
        "V": ("config.model.vocab_size", config.model.vocab_size),
    }


def specs_of(tree: Any) -> Any:
    """Returns the partition spec of every leaf of a tree of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)


def _nest(flat: dict[str, str]) -> dict[str, Any]:
    """Returns the tree of the parameters with a letter string at each leaf."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
