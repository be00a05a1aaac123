# SPDX-License-Identifier: Apache-2.0
"""The same run with rows cut over `context`: its losses, its bytes, its memory."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import sharding
from courses import DATA, ONE_DEVICE, STEPS, WORDS, check_equal, packed_batch, train
from jaxllm.config import (
    Config,
    KernelsConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    override,
)
from jaxllm.errors import InputError
from jaxllm.inspect.collectives import read_collectives
from jaxllm.models import make_cache
from jaxllm.plan.kernels import choose_kernels
from jaxllm.step import compile_eval, compile_step, prepare
from sharding import ShardingError

COURSES = [
    ("fsdp 2 x context 4", "ring"),
    ("fsdp 2 x context 2 x tensor 2", "all_gather"),
    pytest.param("context 4", "ring", marks=pytest.mark.slow),
    pytest.param("context 8", "all_gather", marks=pytest.mark.slow),
]
CONFIG = Config(
    steps=STEPS,
    model=ModelConfig(
        vocab_size=WORDS,
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
        qk_norm=True,
        windows=(11, 0),
        attention_softcap=20.0,
        dtype="float32",
    ),
    data=dataclasses.replace(DATA, sequence_length=64, batch_size=8),
    loss=LossConfig(chunk_tokens=24),
    optimizer=OptimizerConfig(lr=3e-3, warmup_steps=4, microbatches=2),
)


@pytest.mark.parametrize(("mesh", "exchange"), COURSES)
def test_losses_of_20_steps_are_those_of_one_device(mesh, exchange):
    config = override(CONFIG, {"kernels.context": exchange})
    check_equal(f"{mesh} {exchange}", train(CONFIG, ONE_DEVICE), train(config, mesh))


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp 2 x context 2 x tensor 2",
        pytest.param("context 8", marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_is_that_of_one_device_too(mesh):
    sums = []
    for course in (train(CONFIG, ONE_DEVICE), train(CONFIG, mesh)):
        batch = packed_batch(course.setup, 99)
        evaluate = compile_eval(course.setup)
        found = jax.device_get(evaluate(course.state.params, batch))
        sums.append({name: float(value) for name, value in found.items()})
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)


@functools.cache
def long_step(size: int, exchange: str):
    """Returns the compiled step of rows that are longer than the model is wide."""
    config = override(
        CONFIG,
        {
            "kernels.context": exchange,
            "model.windows": (0,),
            "model.remat": "save_attention",
            "data.sequence_length": 512,
            "data.batch_size": 2,
            "optimizer.microbatches": 1,
        },
    )
    mesh = sharding.make_mesh({"context": size}, jax.devices()[:size])
    return mesh, config, compile_step(prepare(config, mesh))


def sent(size: int, exchange: str) -> dict[str, float]:
    """Returns the bytes of keys, values and their gradients that a device sends."""
    mesh, config, step = long_step(size, exchange)
    text = step.as_text()
    assert text is not None
    heads = f",{config.model.num_kv_heads},{config.model.head_dim}]"
    total = dict(forward=0.0, backward=0.0)
    for found in read_collectives(text, mesh):
        of_weights = found.kind == "all-reduce"
        if found.arrays[0].endswith(heads) and not of_weights:
            assert (found.axes, found.count is None) == (("context",), False)
            total[found.phase] += (found.count or 0) * found.wire_bytes
    return total


@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_devices_send_the_bytes_of_the_formula(size, exchange):
    _, config, _ = long_step(size, exchange)
    data, model = config.data, config.model
    tokens = data.batch_size * data.sequence_length // size
    k = tokens * model.num_kv_heads * model.head_dim * 4  # keys of a device
    turns_of_gradients = size if exchange == "ring" else size - 1
    assert sent(size, exchange) == dict(
        forward=model.num_layers * 2 * (size - 1) * k,
        backward=model.num_layers * 2 * (size - 1 + turns_of_gradients) * k,
    )


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_memory_of_a_device_falls_with_the_axis(exchange):
    sizes = (4, 8) if exchange == "all_gather" else (1, 2, 4, 8)
    used = []
    for size in sizes:
        analysis = long_step(size, exchange)[2].memory_analysis()
        assert analysis is not None
        used.append(analysis.temp_size_in_bytes)
    print(f"\n{exchange}: temporary MiB {[round(x / 2**20, 2) for x in used]}")
    # Logits of plain JAX are [T / C, T] when gathered and [T / C, T / C] in a ring.
    assert all(less < 0.6 * more for more, less in itertools.pairwise(used))


def test_rows_that_cannot_be_cut_in_two_chunks_a_device_are_refused():
    config = override(CONFIG, {"data.sequence_length": 44})
    said = r"sequence_length=44: T .* context=8.*length=32 or 48, .*\[1, 2\]"
    with pytest.raises(ShardingError, match=said):
        prepare(config, sharding.make_mesh({"context": 8}))


def test_a_cache_is_refused_where_rows_are_cut():
    with jax.set_mesh(sharding.make_mesh({"context": 8})):
        with pytest.raises(ShardingError, match=r"KV cache .* context=8 .* context=1"):
            make_cache(CONFIG.model, 8, 16)


def test_experts_with_a_capacity_are_refused_where_rows_are_cut():
    moe = MoEConfig(num_experts=4, experts_per_token=2, capacity_factor=1.0)
    model = dataclasses.replace(CONFIG.model, moe=moe)
    dataclasses.replace(CONFIG, model=model)
    with pytest.raises(InputError, match=r"mesh.context=2 .*capacity_factor=None"):
        override(dataclasses.replace(CONFIG, model=model), {"mesh.context": 2})


def test_kernels_that_take_no_ranges_are_refused_where_rows_are_cut():
    kernels = KernelsConfig(attention="cudnn", deterministic=False)
    config = dataclasses.replace(CONFIG, kernels=kernels)
    with pytest.raises(InputError, match="ranges of keys"):
        choose_kernels(config, sharding.make_mesh({"context": 8}))


def test_zigzag_gives_devices_an_early_and_a_late_chunk():
    with jax.set_mesh(sharding.make_mesh({"context": 4}, jax.devices()[:4])):
        row_BT = sharding.constrain(jnp.arange(16, dtype=jnp.int32)[None], "BT")
        [found_BT] = sharding.to_zigzag(row_BT)
    parts = [shard.data[0].tolist() for shard in found_BT.addressable_shards]
    assert parts == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
