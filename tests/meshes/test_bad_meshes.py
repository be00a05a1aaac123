# SPDX-License-Identifier: Apache-2.0
"""Meshes that do not fit: refused on shapes alone, with sizes that would.

A message names the mesh axis and its size, the letter of what it would cut, and what
can be written instead.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import sharding
from jaxllm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    override,
)
from jaxllm.errors import InputError
from jaxllm.models import Model, make_cache
from jaxllm.step import prepare
from sharding import ShardingError

CONFIG = Config(
    steps=4,
    model=ModelConfig(
        vocab_size=96,
        num_layers=4,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
    ),
    data=DataConfig(paths=("none",), sequence_length=32, batch_size=16),
    optimizer=OptimizerConfig(lr=1e-3),
)
EXPERTS = {"model.moe.num_experts": 4}
PARTS = "optimizer.microbatches"
ROUNDS = {"mesh.stage": 2, "mesh.stage_rounds": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, what is changed in CONFIG, and what the message says."""

    sizes: dict[str, int]
    changes: dict[str, Any]
    wrong: str  # letter, size and axes
    remedy: str


CASES = [
    Case({"data": 3}, {}, "B (batch rows) = 16 * data=3", "B=15 or 18"),
    Case({"data": 32}, {}, "B (batch rows) = 16 * data=32", "[1, 2, 4, 8, 16]"),
    Case({"fsdp": 5}, {}, "D (model width) = 32 * fsdp=5", "D=30 or 35"),
    Case({"fsdp": 32}, {}, "B (batch rows) = 16 * fsdp=32", "B=32"),
    Case({"fsdp": 8}, {PARTS: 4}, "B (batch rows) = 4 * fsdp=8", "[1, 2, 4]"),
    Case({"fsdp": 8}, {"model.d_model": 36}, "D (model width) = 36 *=8", "D=32 or 40"),
    Case({"data": 4, "fsdp": 8}, {}, "= 16 * data=4 * fsdp=8", "data*fsdp one of [1,"),
    Case({"tensor": 3}, {}, "N (query heads) = 4 * tensor=3", "N=3 or 6"),
    Case({"tensor": 4}, {}, "K (key/value heads) = 2 * tensor=4", "one of [1, 2]"),
    Case(
        {"tensor": 2}, {"model.d_ff": 47}, "F (MLP width) = 47 * tensor=2", "F=46 or 48"
    ),
    Case(
        {"tensor": 2},
        {"model.vocab_size": 97},
        "V (vocabulary) = 97 * tensor=2",
        "V=96",
    ),
    Case({"tensor": 2, "fsdp": 3}, {}, "D (model width) = 32 * fsdp=3", "D=30 or 33"),
    Case({"context": 3}, {}, "T (query positions) * context=3", "=30 or 36"),
    Case({"context": 32}, {}, "T (query positions) * context=32", "[1, 2, 4, 8, 16]"),
    Case(
        {"context": 8, "tensor": 2},
        {"data.sequence_length": 24},
        "T (query positions) * context=8",
        "sequence_length=16 or 32",
    ),
    Case({"expert": 3}, EXPERTS, "E (experts) = 4 * expert=3", "E=3 or 6"),
    Case({"expert": 8}, EXPERTS, "E (experts) = 4 * expert=8", "[1, 2, 4]"),
    Case({"expert": 4, "fsdp": 8}, EXPERTS, "= 16 * fsdp=8 * expert=4", "B=32"),
    Case(
        {"expert": 4},
        {**EXPERTS, "model.d_model": 34},
        "D (model width) = 34 * expert=4",
        "D=32 or 36",
    ),
    Case(
        {"expert": 2, "tensor": 2},
        {**EXPERTS, "model.moe.d_ff_expert": 15},
        "F (MLP width) = 15 * tensor=2",
        "F=14 or 16",
    ),
    Case({"stage": 3}, {PARTS: 4}, "L (layers) = 4 * stage=3", "num_layers=3 or 6"),
    Case({"stage": 8}, {PARTS: 8}, "L (layers) = 4 * stage=8", "one of [1, 2, 4]"),
    Case(
        {"stage": 4},
        {PARTS: 4, "model.windows": (8, 0)},
        "L (layers) = 2 periods * stage=4",
        "num_layers=8",
    ),
    Case(
        {"stage": 2},
        {**ROUNDS, PARTS: 2},
        "L (layers) = 4 * stage=2 * config.mesh.stage_rounds=3",
        "num_layers=6",
    ),
    Case({"stage": 4}, {PARTS: 2}, "M (microbatches) * stage=4", "use 4 or more"),
    Case(
        {"stage": 2},
        {**ROUNDS, "mesh.stage_rounds": 2, PARTS: 3, "data.batch_size": 15},
        "M (microbatches) * stage=2",
        "use 2 or 4",
    ),
    Case(
        {"stage": 2},
        {PARTS: 2, "model.scan_layers": False},
        "L (layers) * stage=2",
        "True",
    ),
    Case(
        {"stage": 2, "tensor": 2},
        {PARTS: 2, "model.vocab_size": 98},
        "V (vocabulary) = 98 * tensor=2 * stage=2",
        "V=96 or 100",
    ),
    Case({"stage": 2, "fsdp": 8}, {PARTS: 4}, "B (batch rows) = 4 * fsdp=8", "B=8"),
    Case({"stage": 2, "context": 3}, {PARTS: 2}, "T * context=3", "context one of"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.sizes))
def test_a_mesh_that_does_not_fit_is_refused_before_tracing(case, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)  # nothing may be traced or compiled
    config = override(CONFIG, case.changes)
    with pytest.raises(ShardingError) as error:
        prepare(config, sharding.abstract_mesh(case.sizes))  # pyright: ignore
    text = str(error.value)
    wrong = ".*".join(map(re.escape, case.wrong.split("*")))
    lines = [line for line in text.splitlines() if re.search(wrong, line)]
    assert lines, text
    assert any(case.remedy in line for line in lines), text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh.stage_rounds": 2}, r"stage_rounds=2 .* config.mesh.stage=1; use"),
        ({"mesh.stage_rounds": 0}, r"stage_rounds=0 must be above 0"),
        ({"mesh.stage": 0}, r"config.mesh.stage=0 must be .* or -1"),
        ({"mesh.stage": -1}, r"'fsdp': -1.*'stage': -1.* on one axis only"),
        ({"mesh.expert": 2}, r"config.mesh.expert=2 needs experts.* config.mesh.fsdp"),
        (
            {**EXPERTS, "mesh.context": 2, "model.moe.capacity_factor": 1.0},
            r"config.mesh.context=2 shards rows.* config.mesh.context=1",
        ),
    ],
)
def test_a_mesh_that_no_model_fits_is_refused_when_the_config_is_made(changes, said):
    with pytest.raises(InputError, match=said):
        override(CONFIG, changes)


@pytest.mark.parametrize("axis", MeshConfig().sizes)
def test_a_mesh_of_other_devices_is_refused_with_sizes_that_fit(axis):
    with pytest.raises(ShardingError) as error:
        sharding.make_mesh({axis: 3, "fsdp": 3} if axis != "fsdp" else {axis: 3})
    text = str(error.value)
    assert f"'{axis}': 3" in text
    assert "divisors of 8 are [1, 2, 4, 8]" in text


@pytest.mark.parametrize(("axis", "letter"), [("context", "T"), ("stage", "L")])
def test_generation_is_refused_where_a_token_would_need_other_devices(axis, letter):
    with jax.set_mesh(sharding.make_mesh({axis: 2}, jax.devices()[:2])):
        with pytest.raises(ShardingError) as error:
            make_cache(CONFIG.model, 1, 8)
    for part in (f"({letter})", f"mesh {axis}=2", f"{axis}=1", "tensor or fsdp"):
        assert part in str(error.value)


def test_a_model_with_stages_cannot_be_called_without_their_schedule():
    model = Model(CONFIG.model)
    tokens_BT = jnp.zeros((2, 8), jnp.int32)

    def call(params):
        return model.bind(params)(tokens_BT, tokens_BT)

    mesh = sharding.make_mesh({"stage": 2}, jax.devices()[:2])
    places = sharding.plan(model.abstract, model.letters, mesh).shardings(
        model.abstract
    )
    params = jax.tree.map(
        lambda leaf, place: leaf.update(sharding=place), model.abstract, places
    )
    said = r"stage=2 cuts L \(layers\).* schedule"
    with jax.set_mesh(mesh), pytest.raises(ShardingError, match=said):
        jax.eval_shape(call, params)
