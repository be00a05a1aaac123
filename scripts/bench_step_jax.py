# SPDX-License-Identifier: Apache-2.0
"""One arm of bench_step.py that is ours; prints a line of JSON last.

python scripts/bench_step_jax.py JOB
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sharding
from jaxllm.cluster.environment import has_gpus, prepare_gpus
from jaxllm.config import (
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    override,
    presets,
)
from jaxllm.inspect.profiler import TRACEABLE, explain, trace
from jaxllm.plan.budget import flops_per_token, peak_flops
from jaxllm.step import Setup, compile_step, init_state, prepare
from pallas_kernels import offline

WARMUP_STEPS = 3
TRACED_STEPS = 2
PEAK_OF = "NVIDIA H200"  # what MFU is of, also where a tiny run is on a CPU


def make_config(job: dict[str, Any]) -> Config:
    """Returns the run of an arm: the 1B shape as shipped, one document a row."""
    config = Config(
        steps=1000,
        model=getattr(presets, job["preset"])(**job["changes"]),
        data=DataConfig(
            paths=("random",),
            sequence_length=64 if job["tiny"] else 8192,
            batch_size=job["batch"],
            cross_document_attention=True,  # cuDNN and torch know no documents
        ),
        mesh=MeshConfig(fsdp=1),
        optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.1),
    )
    kernels = {f"kernels.{name}": value for name, value in job["kernels"].items()}
    return override(config, kernels)


def make_batch(setup: Setup) -> dict[str, jax.Array]:
    """Returns random tokens, the same in every arm, on the device."""
    row = setup.abstract_batch["tokens"]
    shape = (row.shape[0], row.shape[1] + 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, setup.config.model.vocab_size, shape, dtype=np.int32)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones(row.shape, np.int32),
        "positions": np.broadcast_to(
            np.arange(row.shape[1], dtype=np.int32), row.shape
        ),
    }
    return {name: jax.device_put(a, row.sharding) for name, a in arrays.items()}


def predicted_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns what XLA says a step needs: arguments, results and scratch together."""
    said = compiled.memory_analysis()
    assert said is not None
    return (
        said.argument_size_in_bytes
        + said.output_size_in_bytes
        - said.alias_size_in_bytes
        + said.temp_size_in_bytes
    )


def measure(
    setup: Setup, compiled: Any, job: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[], str]]:
    """Returns the seconds of a step, a value for each reading, and what profiles it."""
    state, batch = init_state(setup), make_batch(setup)
    losses, seconds = [], []
    metrics = {}
    for _ in range(WARMUP_STEPS):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    for _ in range(job["readings"]):
        began = time.perf_counter()
        for _ in range(job["steps"]):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append((time.perf_counter() - began) / job["steps"])
        losses.append(float(metrics["loss"]))
    stats = jax.local_devices()[0].memory_stats() or {}
    found = {
        "step_s": seconds,
        "losses": [losses[0], losses[-1]],
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }
    return found, functools.partial(_profile, setup, state, batch, job["arm"])


def _profile(setup: Setup, state: Any, batch: Any, arm: str) -> str:
    """Returns where the time of two more steps went, of a program made for that."""
    compiled = compile_step(setup, TRACEABLE)
    state, _ = compiled(state, batch)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with trace(Path(folder)):
            for _ in range(TRACED_STEPS):
                state, _ = compiled(state, batch)
            jax.block_until_ready(state)
        return explain(Path(folder), compiled, TRACED_STEPS, arm)


def main(arguments: list[str]) -> None:
    (text,) = arguments
    job = json.loads(text)
    gpus = has_gpus(jax.config.jax_platforms)
    prepare_gpus(os.environ, gpus=gpus)  # as a run does
    config = make_config(job)
    devices = offline.described_devices(1) if job["predict"] else None
    mesh = sharding.make_mesh(config.mesh.sizes, devices)
    setup = prepare(config, mesh)
    began = time.perf_counter()
    compiled = compile_step(setup)
    length, rows = config.data.sequence_length, config.data.batch_size
    found = {
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
        "kernels": dataclasses.asdict(config.kernels),
        "remat": config.model.remat,
        "tokens_a_step": rows * length,
        "flops_a_step": rows * length * flops_per_token(config.model, length),
        "peak_flops": peak_flops(PEAK_OF, "bfloat16"),
        "compile_s": time.perf_counter() - began,
        "predicted_bytes": predicted_bytes(compiled),
    }
    if not job["predict"]:
        measured, profile = measure(setup, compiled, job)
        found |= measured
        if job["profile"]:
            print(json.dumps(found), flush=True)  # in case that profiling fails
            found["profile"] = profile()
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1:])
