# SPDX-License-Identifier: Apache-2.0
"""A training step with every kernel, compiled for 8 H200s that are not there."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("attention", "norm", "cross_entropy")
MESHES = {
    "fsdp 8": "",
    "all": "--config.mesh.data=2 --config.mesh.tensor=2",
    "ring": "--config.mesh.context=4 --config.kernels.context=ring",
}
CONFIG = """
from jaxllm.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        steps=10,
        model=ModelConfig(
            vocab_size=2048,
            num_layers=2,
            d_model=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            d_ff=512,
            remat="save_attention",
        ),
        data=DataConfig(paths=("none",), sequence_length=512, batch_size=16),
        loss=LossConfig(chunk_tokens=512),
        optimizer=OptimizerConfig(name="sgd", lr=1e-3),
    )
"""
# Compiles fast: what is asked here is settled before code is made.
FAST = "--xla_backend_optimization_level=0 --xla_gpu_enable_triton_gemm=false"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, run_offline):
    """Compiles a step on a mesh with all kernels of an implementation; once each."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)

    @functools.cache
    def run(mesh: str, implementation: str) -> dict[str, Any]:
        named = [f"--config.kernels.{name}={implementation}" for name in KERNELS]
        script = [str(ROOT / "scripts" / "compile_step.py"), "--json", "--child"]
        ended = run_offline(
            [*script, f"--config={path}", *MESHES[mesh].split(), *named],
            XLA_FLAGS=FAST,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        return json.loads(ended.stdout)

    return run


@pytest.mark.parametrize("mesh", ["fsdp 8", "all"])
def test_kernels_communicate_nothing_that_plain_jax_does_not(compiled, mesh):
    plain, kernels = compiled(mesh, "xla"), compiled(mesh, "mosaic")
    assert plain["kernels"] == {}
    more = {
        kind: (count, plain["collectives"].get(kind, 0))
        for kind, count in kernels["collectives"].items()
        if count > plain["collectives"].get(kind, 0)
    }
    assert more == {}


def test_the_attention_kernel_runs_once_forward_and_once_backward(compiled):
    calls = compiled("fsdp 8", "mosaic")["kernels"]
    # A loop's body counts once: not a second time in the backward pass, which has the
    # output and its logarithms from the forward pass.
    assert calls["attention_forward"] == 1
    assert calls["attention_dq"] == calls["attention_dkv"] == 1
    # Two in a layer, again in its backward pass, and the last one.
    assert calls["norm_forward"] == 2 + 2 + 1
    assert calls["norm_backward"] == 2 + 1


def test_a_ring_calls_the_attention_kernels_in_each_of_its_turns(compiled):
    found = compiled("ring", "mosaic")
    # Turns but the first, backward, and the last are the bodies of loops.
    assert found["kernels"]["attention_forward"] == 2
    assert found["kernels"]["attention_dq"] == found["kernels"]["attention_dkv"] == 3
    # Keys with values in one array, their gradients in another: two layers, forward
    # three turns, backward three and four.
    assert found["collectives"]["collective-permute"] == 2 * (3 + 3 + 4)


def test_kernels_need_less_temporary_memory(compiled):
    plain, kernels = compiled("fsdp 8", "xla"), compiled("fsdp 8", "mosaic")
    for name in ("arguments_bytes", "outputs_bytes", "aliased_bytes"):
        assert kernels[name] == plain[name]
    assert kernels["temporary_bytes"] < plain["temporary_bytes"]
