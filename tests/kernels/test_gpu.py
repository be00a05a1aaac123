# SPDX-License-Identifier: Apache-2.0
"""On a real GPU: every case at its real shape, sizes beyond int32, and training.

    JAX_PLATFORMS=cuda python -m pytest --noconftest -n 4 -m gpu \
      tests/kernels/test_gpu.py

Without the conftest, which needs all that training needs. Each case runs in a process
of its own: a kernel that hangs or faults fails its own test only.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import sharding
from jaxllm.config import load_config
from jaxllm.step import compile_step, init_state, prepare
from pallas_kernels.case import OPERATIONS, draw_normal, find_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") == "cpu" or jax.default_backend() != "gpu",
        reason="needs an NVIDIA GPU, and JAX_PLATFORMS=cuda",
    ),
]
CASE_S = 240  # of a process: start, compile, check
STEPS = 200
CONFIGS = Path(__file__).parents[2] / "configs"
# bfloat16 has 8 bits: a loss of two runs that round differently differs by about this.
BFLOAT16_NOISE = 2.0**-8
draw = jax.jit(draw_normal, static_argnums=(1, 2))  # in one pass: no float32 array


def names(operation: str) -> list[str]:
    if not (Path(pallas_kernels.__file__).parent / operation / "cases.py").exists():
        return []  # test_offline says so
    return [case.name for case in find_cases(operation)]


CASES = [(operation, name) for operation in OPERATIONS for name in names(operation)]


@pytest.mark.parametrize(("operation", "name"), CASES)
def test_a_kernel_gives_what_its_reference_says_and_the_same_bits_twice(
    operation, name
):
    ended = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.bench.check", operation, name],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        timeout=CASE_S,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["verdict"] == {"mosaic": "right"}, found
    if "fused" not in name:  # adds gradients in any order, and says so
        assert found["same_bits"]["mosaic"], found


def test_a_tensor_of_more_than_2_to_the_31_elements_is_attended_to_its_end():
    length, heads, window = 2**17 + 64, 128, 128
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTNH = draw(keys[0], (1, length, heads, 128), jnp.bfloat16)
    kv_shape = (1, length, 8, 128)
    k_BSKH, v_BSKH = (draw(key, kv_shape, jnp.bfloat16) for key in keys[1:])
    assert q_BTNH.size > 2**31
    out = pallas_kernels.attention(
        q_BTNH, k_BSKH, v_BSKH, window=window, implementation="mosaic"
    )
    last = slice(length - 2 * window, length)
    expected = pallas_kernels.attention(
        q_BTNH[:, last],
        k_BSKH[:, last],
        v_BSKH[:, last],
        window=window,
        implementation="xla",
    )
    # The first window of the slice sees keys before it, which the slice does not have.
    a, b = (np.asarray(x[0, -window:], np.float32) for x in (out, expected))
    assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)
    assert np.isfinite(np.asarray(jnp.abs(out).max(), np.float32))


def test_a_norm_of_more_than_2_to_the_31_elements_is_right_in_its_last_rows():
    x_TD = draw(jax.random.key(0), (2**18 + 5, 8192), jnp.bfloat16)
    scale_D = jax.random.normal(jax.random.key(1), (8192,), jnp.float32)
    norm = functools.partial(pallas_kernels.rms_norm, eps=1e-6)
    out = norm(x_TD, scale_D, implementation="mosaic")
    expected = norm(x_TD[-64:], scale_D, implementation="xla")
    a, b = (np.asarray(x, np.float32) for x in (out[-64:], expected))
    assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def losses(kernels: str) -> np.ndarray:
    """Returns the losses of the quickstart's model on text that can be learned."""
    names = ("attention", "norm", "cross_entropy")
    overrides = {f"kernels.{name}": kernels for name in names}
    overrides |= {"data.batch_size": 16, "mesh.fsdp": 1, "steps": STEPS}
    overrides |= {"optimizer.name": "adamw", "optimizer.lr": 1e-3}
    config = load_config(CONFIGS / "quickstart_gpu.py", overrides)
    mesh = sharding.make_mesh(config.mesh.sizes)
    setup = prepare(config, mesh)
    step, state = compile_step(setup), init_state(setup)
    rng = np.random.default_rng(0)
    successors = rng.integers(0, 4096, 4096)
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, _batch(setup, rng, successors))
        found.append(metrics["loss"])
    return np.asarray(jax.device_get(found))


def _batch(setup, rng, successors):
    """Returns packed documents in which the next token most often follows from this."""
    rows, length = setup.abstract_batch["tokens"].shape
    tokens = np.empty((rows, length + 1), np.int32)
    tokens[:, 0] = rng.integers(0, 4096, rows)
    for t in range(length):
        guess = rng.integers(0, 4096, rows)
        tokens[:, t + 1] = np.where(
            rng.random(rows) < 0.9, successors[tokens[:, t]], guess
        )
    ends = np.sort(rng.integers(1, length, (rows, 3)), axis=1)
    places = np.arange(length)
    segments = 1 + (places[None, :, None] >= ends[:, None]).sum(-1)
    starts = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=0) > 0, places, 0), axis=1
    )
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments.astype(np.int32),
        "positions": (places - starts).astype(np.int32),
    }
    return {
        name: jax.device_put(array, setup.abstract_batch[name].sharding)
        for name, array in arrays.items()
    }


def test_training_with_every_kernel_loses_as_much_as_without():
    ours, plain = losses("mosaic"), losses("xla")
    assert plain[-20:].mean() < 0.8 * plain[0]
    assert abs(ours[0] - plain[0]) < BFLOAT16_NOISE * plain[0]
    # Rounding differs in every step, and the runs drift apart as two seeds of dropout
    # do: the mean of a fifth of the run is what must agree.
    difference = abs(ours.reshape(5, -1).mean(1) - plain.reshape(5, -1).mean(1))
    assert (difference < 2 * BFLOAT16_NOISE * plain.reshape(5, -1).mean(1)).all()
