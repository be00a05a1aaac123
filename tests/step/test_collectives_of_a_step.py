# SPDX-License-Identifier: Apache-2.0
"""What a compiled step costs on 8 devices: collectives, memory, compilations.

The expected numbers follow from the design, by the number of matrices and norms of a
layer. A difference is either a mistake or a new design: then say so in DESIGN and here.
One thing is what XLA does on CPUs alone: what is added up and then cut, gradients of
layers and the residual stream, is one reduce-scatter on GPUs (test_step_budget.py).
"""

import collections
import dataclasses
import logging
import math
import re

import jax
import numpy as np
import pytest

import sharding
from jaxllm.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig
from jaxllm.inspect.collectives import read_collectives
from jaxllm.step import Setup, compile_step, init_state, prepare

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "tensor": dict(tensor=2, fsdp=4),
    "all": dict(data=2, fsdp=2, tensor=2),
}
MIB = 2**20
CONFIG = Config(
    steps=10,
    model=ModelConfig(
        vocab_size=1280,
        num_layers=4,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=1024,  # 1 MiB a matrix and layer
    ),
    data=DataConfig(paths=("none",), sequence_length=24, batch_size=16),
    loss=LossConfig(chunk_tokens=24),
    optimizer=OptimizerConfig(lr=1e-3),
)


@dataclasses.dataclass(frozen=True)
class Moved:
    """One tensor that one instruction moves between devices."""

    kind: str
    loop: str  # "forward", "backward" or "loss": the while-loop it is in, or ""
    shape: tuple[int, ...]  # that a device puts in
    axes: tuple[str, ...]  # of the mesh


def moved(setup: Setup, step: jax.stages.Compiled) -> list[Moved]:
    """Returns what a step moves, scalars of the metrics left out."""
    text = step.as_text()
    assert text is not None
    found = []
    for collective in read_collectives(text, setup.mesh):
        loops = ("jvp(loss)", "loss"), ("transpose(", "backward"), ("jvp(", "forward")
        loop = next((loop for word, loop in loops if word in collective.loop), "")
        for array in collective.arrays:
            shape = tuple(int(dim) for dim in re.findall(r"\d+", array.split("[")[1]))
            if shape:
                axes = collective.axes or ()
                found.append(Moved(collective.kind, loop, shape, axes))
    return found


@pytest.fixture(scope="module")
def setups() -> dict[str, Setup]:
    return {name: prepare(CONFIG, sharding.make_mesh(MESHES[name])) for name in MESHES}


@pytest.fixture(scope="module")
def steps(setups) -> dict[str, jax.stages.Compiled]:
    return {name: compile_step(setups[name]) for name in ("data", "fsdp", "tensor")}


def counted(tensors: list[Moved]) -> dict[str, int]:
    return dict(collections.Counter(f"{m.loop} {m.kind}".strip() for m in tensors))


def counts(setups, steps, name: str) -> dict[str, int]:
    """Counts by loop and kind what is not an activation."""
    tensors = moved(setups[name], steps[name])
    if name == "tensor":
        tensors = [m for m in tensors if not _is_activation(m.shape)]
    return counted(tensors)


def activations(setups, steps) -> dict[str, int]:
    tensors = moved(setups["tensor"], steps["tensor"])
    return counted([m for m in tensors if _is_activation(m.shape)])


def _is_activation(shape: tuple[int, ...]) -> bool:
    rows = CONFIG.data.batch_size // 4  # tensor 2 x fsdp 4
    length, width = CONFIG.data.sequence_length, CONFIG.model.d_model
    chunk = CONFIG.loss.chunk_tokens
    of_loss = ((chunk, width), (chunk, 1))
    return shape in ((rows, length, width), (rows, length // 2, width), *of_loss)


def _cuts_rows(tensor: Moved) -> bool:
    return tensor.axes != ("tensor",)


@pytest.fixture(scope="module")
def layer(setups) -> collections.Counter:
    """Counts the matrices and the scales of norms in a layer."""
    letters = setups["fsdp"].model.letters.values()
    in_layers = [axes for axes in letters if axes.startswith("L")]
    return collections.Counter("scale" if a == "LD" else "matrix" for a in in_layers)


def test_a_layer_has_seven_matrices_and_two_scales(layer):
    assert layer == dict(matrix=7, scale=2)


def test_data_parallel_steps_add_up_each_gradient_once(setups, steps, layer):
    assert counts(setups, steps, "data") == {
        "backward all-reduce": layer["matrix"] + layer["scale"],
        "all-reduce": 3 + 1,  # embedding, output, final norm; the pair of losses
    }


def test_replicas_add_up_gradients_once_a_step_whatever_the_microbatches(layer):
    optimizer = dataclasses.replace(CONFIG.optimizer, microbatches=2)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    setup = prepare(config, sharding.make_mesh(MESHES["data"]))
    found = counted(moved(setup, compile_step(setup)))
    # Outside of all loops: layers, and embedding, output, final norm.
    assert found == {"all-reduce": layer["matrix"] + layer["scale"] + 3}


@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_weights_are_gathered_once_forward_and_once_backward(
    setups, steps, layer, name
):
    found = counts(setups, steps, name)
    assert found.pop("forward all-gather") == layer["matrix"] + layer["scale"]
    # A scale is small: it is kept from the forward pass.
    assert found.pop("backward all-gather") == layer["matrix"]
    assert found.pop("all-gather") == 3  # embedding, output, final norm
    assert found.pop("backward all-reduce") == layer["matrix"] + layer["scale"]
    assert found.pop("reduce-scatter") == 2  # gradients of embedding and output
    assert found.pop("all-reduce") <= 2  # of the final norm; the pair of losses
    assert found == {}


@pytest.mark.parametrize("remat", ["full", "save_attention", "dots"])
def test_computing_a_layer_again_gathers_its_weights_no_third_time(remat, layer):
    model = dataclasses.replace(CONFIG.model, remat=remat)
    config = dataclasses.replace(CONFIG, model=model)
    setup = prepare(config, sharding.make_mesh(MESHES["fsdp"]))
    found = counted(moved(setup, compile_step(setup)))
    # The backward pass uses the weights that the second forward pass gathered.
    assert found["forward all-gather"] == layer["matrix"] + layer["scale"]
    assert found["backward all-gather"] == layer["matrix"] + layer["scale"]


def test_tensor_parallel_steps_reduce_activations_where_a_sum_is_cut(setups, steps):
    assert activations(setups, steps) == {
        "forward all-reduce": 2,  # after attention and after the MLP
        # Before them: query, key and value add theirs up first, as up and gate do.
        "backward reduce-scatter": 2,
        "all-reduce": 1,  # the embedding's rows
        # Largest logit, sum of exponentials, target's logit; gradient of x.
        "loss all-reduce": 3 + 1,
        # The residual stream is cut along T: gathered before attention and before the
        # MLP, backward again for the weights' gradients, and as a gradient.
        "forward all-gather": 2,
        "backward all-gather": 2 + 2,
        "all-gather": 1 + 1,  # before the loss; the gradient of the embedding's rows
    }


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor"])
def test_rows_and_their_activations_are_never_gathered(setups, steps, name):
    tensors = moved(setups[name], steps[name])
    gathered = [m.shape for m in tensors if m.kind == "all-gather" and _cuts_rows(m)]
    rows, length = CONFIG.data.batch_size, CONFIG.data.sequence_length
    lengths = (length,), (length // 2,)  # that of the residual stream on tensor 2
    # Weights may have a dim of the same size, but not behind one of rows.
    assert not [s for s in gathered if s[0] <= rows and s[1:2] in lengths]


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor"])
def test_no_float32_array_of_all_logits_is_in_the_step(steps, name):
    text = steps[name].as_text()
    config = CONFIG.data
    vocab = CONFIG.model.vocab_size // (2 if name == "tensor" else 1)
    rows = config.batch_size // (4 if name == "tensor" else 8)
    tokens = rows * config.sequence_length
    assert f"[{CONFIG.loss.chunk_tokens},{vocab}]" in text  # those of a chunk
    assert f"[{tokens},{vocab}]" not in text
    assert f"[{rows},{config.sequence_length},{vocab}]" not in text


@pytest.mark.parametrize("name", ["fsdp", "tensor", "all"])
def test_no_large_array_of_the_state_is_whole_on_a_device(setups, name):
    setup = setups[name]
    state = setup.abstract_state
    leaves = jax.tree.leaves_with_path((state.params, state.opt_state))
    large = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in leaves
        if leaf.size * leaf.dtype.itemsize >= MIB
    ]
    # The matrices of the MLP, embedding and output; each has two moments.
    assert len(large) == 3 * (3 + 2)
    ways = setup.mesh.size // setup.mesh.shape["data"]
    for path, leaf in large:
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert shard * ways == leaf.size, path


def test_the_arrays_of_a_new_state_lie_as_planned(setups):
    setup = setups["fsdp"]
    state = init_state(setup)
    for device in jax.devices():
        total = held = 0
        for leaf in jax.tree.leaves((state.params, state.opt_state)):
            total += leaf.nbytes
            held += sum(
                s.data.nbytes for s in leaf.addressable_shards if s.device == device
            )
        # All but the counter of steps and the like is cut 8 ways.
        assert total / 8 <= held <= total / 8 + 64
    planned = jax.tree.leaves(setup.abstract_state)
    for leaf, plan in zip(jax.tree.leaves(state), planned, strict=True):
        assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)


def test_a_loop_of_steps_compiles_nothing(setups, steps, caplog):
    setup, step = setups["fsdp"], steps["fsdp"]
    state = init_state(setup)
    row = setup.abstract_batch["tokens"]
    ones = np.ones(row.shape, np.int32)
    metrics = {}
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        for _ in range(3):
            batch = {
                n: jax.device_put(ones, row.sharding) for n in setup.abstract_batch
            }
            state, metrics = step(state, batch)
        jax.device_get(metrics)
    assert int(state.step) == 3
    assert [r.message for r in caplog.records if "Compiling" in r.message] == []


def test_a_compiled_step_refuses_another_shape(setups, steps):
    setup = setups["fsdp"]
    state = init_state(setup)
    place = setup.abstract_batch["tokens"].sharding
    short = jax.device_put(np.ones((8, 32), np.int32), place)
    with pytest.raises(TypeError, match="compiled with"):
        steps["fsdp"](state, dict.fromkeys(setup.abstract_batch, short))
