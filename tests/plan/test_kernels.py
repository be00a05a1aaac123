# SPDX-License-Identifier: Apache-2.0
"""Which implementation each operation of a run takes, and why."""

import dataclasses

import jax
import pytest

import sharding
from jaxllm.config import (
    Config,
    DataConfig,
    KernelsConfig,
    ModelConfig,
    OptimizerConfig,
    override,
)
from jaxllm.errors import InputError
from jaxllm.plan.cost import choices
from jaxllm.plan.kernels import ASKS, Ask, check_kernels, choose_kernels
from jaxllm.step import prepare
from pallas_kernels import mosaic
from pallas_kernels.choice import Choice

CONFIG = Config(
    steps=1,
    model=ModelConfig(
        vocab_size=4096,
        num_layers=1,
        d_model=128,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        d_ff=32,
    ),
    data=DataConfig(paths=("none",), sequence_length=8, batch_size=8),
    optimizer=OptimizerConfig(lr=1e-3),
)


@pytest.fixture
def mesh():
    return sharding.make_mesh(dict(tensor=2), jax.devices()[:2])


def taken(mesh, **changes) -> dict[str, tuple[str, str]]:
    """Returns the choices, by label, where the device is a (simulated) Hopper GPU."""
    config = override(CONFIG, {k.replace("__", "."): v for k, v in changes.items()})
    with mosaic.interpret():
        chosen = choose_kernels(config, mesh)
    return {ask.label: choice for ask, choice in chosen.items()}


def test_auto_takes_our_kernels_where_they_can_run(mesh):
    names = {name: choice[0] for name, choice in taken(mesh).items()}
    assert names == dict.fromkeys(["attention", "norm", "cross_entropy"], "mosaic")
    assert taken(mesh, model__qk_norm=True)["norm of heads"][0] == "mosaic"


def test_experts_take_the_grouped_matmul(mesh):
    experts = dict(model__moe__num_experts=4, model__moe__d_ff_expert=128)
    assert taken(mesh, **experts)["grouped_matmul of experts"][0] == "mosaic"
    narrow = dict(model__moe__d_ff_expert=64)
    choices = taken(mesh, **experts | narrow)
    implementation, reason = choices["grouped_matmul of experts"]
    assert implementation == "xla"
    assert "widths 128 and 32" in reason
    with pytest.raises(InputError, match=r"kernels\.grouped_matmul=mosaic: "):
        taken(mesh, **experts | dict(kernels__grouped_matmul="mosaic", **narrow))


@pytest.mark.parametrize(
    ("changes", "operation", "reason"),
    [
        (dict(model__dtype="float32"), "attention", "dtype float32"),
        (dict(model__head_dim=32), "attention", "head width 32"),
        (dict(model__dtype="float32"), "cross_entropy", "dtype float32"),
        (dict(model__vocab_size=1002), "cross_entropy", "vocabulary of 501"),
        (dict(model__qk_norm=True, model__head_dim=10), "norm of heads", "width 10"),
    ],
)
def test_auto_says_what_a_kernel_cannot_do(mesh, changes, operation, reason):
    implementation, why = taken(mesh, **changes)[operation]
    assert implementation == "xla"
    assert reason in why


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kernels__attention="cudnn"), "attention=cudnn: .*segments"),
        (dict(kernels__attention="mosaic", model__head_dim=32), "head width 32"),
        (dict(kernels__norm="mosaic", model__d_model=7), "norm=mosaic: .*width 7"),
        (dict(kernels__cross_entropy="mosaic", model__vocab_size=1002), "of 501"),
    ],
)
def test_a_kernel_that_was_named_and_cannot_is_refused(mesh, changes, message):
    with pytest.raises(InputError, match=rf"config\.kernels\..*{message}"):
        taken(mesh, **changes)


def test_a_cpu_takes_plain_jax_and_the_report_says_so_once(mesh):
    lines = choices(prepare(CONFIG, mesh)).splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "attention: xla",
        "norm: xla",
        "cross_entropy: xla",
    ]
    assert all("(auto: mosaic: no " in line and "cpu" in line for line in lines)


def test_every_implementation_that_a_config_names_is_asked_for():
    settings = {field.name for field in dataclasses.fields(KernelsConfig)}
    others = {"context", "deterministic", "self_check"}
    assert {ask.setting for ask in ASKS} == settings - others
    assert len({ask.label for ask in ASKS}) == len(ASKS)


def test_a_new_operation_is_one_more_ask(mesh, monkeypatch):
    checked = []
    new = Ask(
        setting="norm",
        label="norm of norms",
        choose=lambda config, mesh: Choice("mosaic", "new"),
        check=lambda implementation, *_: checked.append(implementation),
    )
    monkeypatch.setattr("jaxllm.plan.kernels.ASKS", (*ASKS, new))
    assert choices(prepare(CONFIG, mesh)).endswith("norm of norms: mosaic (auto: new)")
    check_kernels(CONFIG, mesh)
    assert checked == ["mosaic"]
