# SPDX-License-Identifier: Apache-2.0
"""The checks of jaxllm.config: a wrong value is refused by the name of its setting."""

import dataclasses
import re

import pytest

from jaxllm.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    override,
    presets,
)
from jaxllm.config.fields import setting_types, settings
from jaxllm.errors import InputError

CONFIG = Config(
    steps=100,
    model=presets.tiny_1m(),
    data=DataConfig(paths=("a", "b"), sequence_length=64, batch_size=8),
    optimizer=OptimizerConfig(lr=1e-3),
)

REFUSED = {
    "config.steps": 0,
    "config.seed": -1,
    "config.model.vocab_size": 0,
    "config.model.num_layers": 0,
    "config.model.d_model": -1,
    "config.model.num_kv_heads": 3,
    "config.model.head_dim": 3,
    "config.model.norm_eps": 0.0,
    "config.model.rope_theta": float("inf"),
    "config.model.attention_softcap": 0.0,
    "config.model.logit_softcap": float("nan"),
    "config.model.windows": (0, 0, 0),
    "config.data.paths": (),
    "config.data.weights": (1.0,),
    "config.data.sequence_length": 1,
    "config.data.end_of_document": -1,
    "config.data.batch_size": 0,
    "config.data.prefetch": 0,
    "config.mesh.data": 0,
    "config.mesh.tensor": -2,
    "config.loss.z_loss": -1.0,
    "config.loss.chunk_tokens": 0,
    "config.optimizer.lr": float("nan"),
    "config.optimizer.warmup_steps": 101,
    "config.optimizer.decay_fraction": 1.5,
    "config.optimizer.final_lr_fraction": -0.1,
    "config.optimizer.weight_decay": -0.1,
    "config.optimizer.b1": 1.0,
    "config.optimizer.b2": -0.1,
    "config.optimizer.eps": 0.0,
    "config.optimizer.clip_norm": 0.0,
    "config.optimizer.microbatches": 3,
    "config.eval.every": -1,
    "config.eval.batches": -1,
    "config.checkpoint.every": 0,
    "config.checkpoint.keep_latest": 0,
    "config.checkpoint.keep_every": 7,
    "config.logging.every": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_value_is_refused_with_setting_and_value(name):
    with pytest.raises(InputError) as error:
        override(CONFIG, {name: REFUSED[name]})
    assert name in str(error.value)
    assert str(REFUSED[name]) in str(error.value)
    assert str(error.value).endswith(".")


TOO_FAR = [
    ("config.steps", 2**31),
    ("config.model.vocab_size", 2**31),
    ("config.model.d_model", 10**9),
    ("config.model.num_layers", 10**9),
    ("config.model.num_heads", 10**9),
    ("config.model.windows", (1,) * 1000),
    ("config.model.d_ff", 2**20 + 1),
    ("config.model.rope_theta", 0.5),
    ("config.data.sequence_length", 2**25),
    ("config.data.batch_size", 2**31 - 1),
    ("config.optimizer.lr", 1e39),
    ("config.optimizer.lr", 1e-40),
    ("config.optimizer.eps", 1e-60),
    ("config.optimizer.b2", 1 - 1e-12),
    ("config.optimizer.microbatches", 2**30),
]


@pytest.mark.parametrize(("name", "value"), TOO_FAR)
def test_a_value_beyond_what_devices_can_do_is_refused(name, value):
    with pytest.raises(InputError) as error:
        override(CONFIG, {"model.num_layers": 1000, name: value})
    assert name in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("name", setting_types())
def test_no_number_is_taken_that_devices_cannot_count_or_hold(name):
    kind = setting_types()[name]
    values = {int: [2**32, 10**20, 10**400, 10**5000], float: [1e39, float("inf")]}
    if name == "seed":
        values[int] = values[int][1:]
    for value in values.get(kind, []):
        with pytest.raises(InputError, match=re.escape(f"config.{name}")):
            override(CONFIG, {name: value})


def test_a_matrix_that_no_memory_holds_is_refused_with_both_of_its_sides():
    experts = {"model.moe.num_experts": 2**16, "model.moe.d_ff_expert": 2**20}
    for changes in (experts, {"model.vocab_size": 2**30, "model.d_model": 2**16}):
        with pytest.raises(InputError, match=r"d_model=\d+ times .* at most"):
            override(CONFIG, changes)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_each_weight_must_be_positive(weights):
    with pytest.raises(InputError, match="weights"):
        override(CONFIG, {"data.weights": weights})


@pytest.mark.parametrize("name", ["paths", "eval_paths"])
def test_a_path_is_named_once(name):
    with pytest.raises(
        InputError, match=rf"config\.data\.{name} names a more than once"
    ):
        override(CONFIG, {f"data.{name}": ("a", "b", "a")})


@pytest.mark.parametrize("weights", [(1e308, 1.0), (1e308, 1e308, 1.0), (1.0, 1e-4)])
def test_a_weight_that_gives_no_row_is_refused(weights):
    paths = tuple(f"path-{i}" for i in range(len(weights)))
    with pytest.raises(InputError, match=f"leaves no row of {paths[-1]} among"):
        override(CONFIG, {"data.paths": paths, "data.weights": weights})


def test_weights_count_in_proportion_whatever_their_size():
    paths = {"data.paths": ("a", "b"), "data.weights": (1e308, 1e308)}
    assert override(CONFIG, paths).data.weights == (1e308, 1e308)


def test_negative_windows_are_refused():
    with pytest.raises(InputError, match="windows"):
        override(CONFIG, {"model.windows": (-1,)})


def test_two_free_mesh_axes_are_refused():
    with pytest.raises(InputError, match="one axis only"):
        MeshConfig(data=-1, fsdp=-1)


def test_zero_evaluations_are_accepted():
    assert EvalConfig(every=0, batches=0).every == 0


def test_a_config_cannot_be_changed_and_can_be_a_static_argument():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.steps = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(CONFIG) == hash(dataclasses.replace(CONFIG))


def test_every_setting_says_what_it_means():
    assert [setting.name for setting in settings() if not setting.doc] == []


def test_there_are_about_80_settings_at_most_beside_those_of_imported_models():
    imported = tuple(
        f"config.model.{section}." for section in ("rope", "variant", "moe.variant")
    )
    own = [each for each in settings() if not each.name.startswith(imported)]
    assert len(own) <= 88


MOE_REFUSED = {
    "config.model.moe.num_experts": -1,
    "config.model.moe.experts_per_token": 9,
    "config.model.moe.d_ff_expert": -1,
    "config.model.moe.num_shared_experts": -1,
    "config.model.moe.renormalize": True,
    "config.model.moe.balance_weight": -0.1,
    "config.model.moe.router_z_loss": float("inf"),
    "config.model.moe.capacity_factor": 0.0,
    "config.model.variant.mlp_limit": 7.0,
}


@pytest.mark.parametrize("name", MOE_REFUSED)
def test_a_wrong_value_of_a_mixture_is_refused_with_setting_and_value(name):
    config = override(CONFIG, {"model.moe.num_experts": 8})
    with pytest.raises(InputError) as error:
        override(config, {name: MOE_REFUSED[name]})
    assert f"{name}={MOE_REFUSED[name]}" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.windows": (4,)},
        {"model.variant.attention_sinks": True},
        {"data.cross_document_attention": True},
    ],
)
def test_chunks_are_refused_beside_windows_sinks_and_rows_without_ends(changes):
    override(CONFIG, chunk := {"model.variant.attention_chunk": 8})
    with pytest.raises(InputError, match=r"attention_chunk=8 (is not for|begins)"):
        override(CONFIG, {**chunk, **changes})


def test_a_share_of_the_input_is_refused_beside_biases():
    share = {"model.moe.num_experts": 8, "model.moe.variant.share_of": "input"}
    override(CONFIG, share)
    with pytest.raises(InputError, match=r"variant\.share_of=input is not for"):
        override(CONFIG, {**share, "model.bias": "all"})


def test_a_z_loss_needs_a_softmax():
    moe = {"model.moe.num_experts": 8, "model.moe.router_z_loss": 0.1}
    override(CONFIG, moe)
    with pytest.raises(InputError, match=r"router=softmax"):
        override(CONFIG, {**moe, "model.moe.router": "sigmoid"})


def test_settings_of_experts_without_experts_are_refused():
    with pytest.raises(InputError, match=r"moe\.d_ff_expert=64 needs experts"):
        override(CONFIG, {"model.moe.d_ff_expert": 64})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"first_dense": 4}, "first_dense=4 leaves none of config.model.num_layers=4"),
        ({"layers": (False,)}, "gives no layer experts"),
        (
            {"first_dense": 1, "layers": (True, False)},
            "num_layers=4 less config.model.moe.variant.first_dense=1 must be a "
            "multiple of the 2 entries of config.model.moe.variant.layers="
            "(True, False); use 3 or 5",
        ),
        ({"shared_gate": True}, "shared_gate=True needs shared experts"),
        ({"groups": 3}, "groups=3 must divide config.model.moe.num_experts=8"),
        ({"groups": 4, "group_best": 3}, "group_best=3 must not be above the 2"),
        ({"groups": 4, "groups_per_token": 5}, "groups_per_token=5 must not be above"),
        ({"groups": 5}, "groups=5 must divide config.model.moe.num_experts=8"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes, said):
    moe = {f"model.moe.variant.{name}": value for name, value in changes.items()}
    settings = {"model.num_layers": 4, "model.moe.num_experts": 8, **moe}
    with pytest.raises(InputError, match=re.escape(said)):
        override(CONFIG, settings)


def test_a_group_has_at_least_the_experts_of_a_token():
    settings = {"model.moe.num_experts": 8, "model.moe.variant.groups": 4}
    with pytest.raises(InputError, match=r"must not be above the 2 experts of"):
        override(CONFIG, {**settings, "model.moe.experts_per_token": 3})


def test_a_section_in_a_section_is_changed_together_with_it():
    changes = {"model.moe.num_experts": 4, "model.d_ff": 64, "steps": 7}
    config = override(CONFIG, changes)
    assert (config.model.moe.num_experts, config.model.d_ff, config.steps) == (4, 64, 7)
    assert config.model.d_ff_expert == 64
    assert (
        override(config, {"model.moe.num_experts": 0}).model
        == override(CONFIG, {"model.d_ff": 64}).model
    )


@pytest.mark.parametrize("size", [2, -1])
def test_an_expert_axis_without_experts_is_refused(size):
    with pytest.raises(
        InputError, match=rf"mesh\.expert={size} needs experts"
    ) as error:
        override(CONFIG, {"mesh.expert": size, "mesh.fsdp": 1})
    assert "use config.mesh.fsdp" in str(error.value)
