# SPDX-License-Identifier: Apache-2.0
"""Times the training loop against a plain hand-written JAX step of the same shape.

python scripts/bench_train.py --config configs/quickstart.py [--rounds 15]

Both train the same model on rows of random tokens, in turns, so that a change of the
machine's speed hits both; the figure is the median of the rounds' ratios. The plain
step is what an engineer writes for one device: no mesh, no data pipeline, no metrics.
"""

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from jaxllm import flags
from jaxllm.cluster.phases import Phases
from jaxllm.config import CheckpointConfig, Config, EvalConfig, MeshConfig, ModelConfig
from jaxllm.run.startup import open_run

FOREVER = 10**9


def plain_params(model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns parameters of the shapes that the config asks for."""
    d, f, v = model.d_model, model.d_ff, model.vocab_size
    n, k, h, layers = (
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.num_layers,
    )
    shapes = {
        "query": (layers, d, n, h),
        "key": (layers, d, k, h),
        "value": (layers, d, k, h),
        "out": (layers, n, h, d),
        "gate": (layers, d, f),
        "up": (layers, d, f),
        "down": (layers, f, d),
    }
    keys = iter(jax.random.split(key, len(shapes) + 2))
    blocks = {
        name: 0.02 * jax.random.normal(next(keys), s) for name, s in shapes.items()
    }
    blocks |= {"norm1": jnp.ones((layers, d)), "norm2": jnp.ones((layers, d))}
    embedding = 0.02 * jax.random.normal(next(keys), (v, d))
    params = {"embedding": embedding, "blocks": blocks, "norm": jnp.ones(d)}
    if not model.tie_embeddings:
        params["output"] = 0.02 * jax.random.normal(next(keys), (d, v))
    return params


def plain_loss(model: ModelConfig, params: dict[str, Any], tokens_BU: jax.Array):
    """Returns the mean next-token loss, with all logits at once."""
    dtype = jnp.dtype(model.dtype)
    tokens_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
    t = tokens_BT.shape[1]
    mask_TS = jnp.tril(jnp.ones((t, t), bool))

    def norm(x_BTD, scale_D):
        h_BTD = x_BTD.astype(jnp.float32)
        h_BTD *= jax.lax.rsqrt((h_BTD**2).mean(-1, keepdims=True) + model.norm_eps)
        return (h_BTD * scale_D).astype(dtype)

    def rotate(x_BTNH):
        half = x_BTNH.shape[-1] // 2
        speeds = model.rope_theta ** (-jnp.arange(half) / half)
        angles = jnp.arange(t)[:, None] * speeds
        cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
        a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

    def block(x_BTD, w):
        w = jax.tree.map(lambda a: a.astype(dtype), w)
        h_BTD = norm(x_BTD, w["norm1"])
        q_BTNH = rotate(jnp.einsum("BTD,DNH->BTNH", h_BTD, w["query"]))
        k_BTKH = rotate(jnp.einsum("BTD,DKH->BTKH", h_BTD, w["key"]))
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", h_BTD, w["value"])
        repeats = model.num_heads // model.num_kv_heads
        k_BTNH, v_BTNH = (jnp.repeat(a, repeats, 2) for a in (k_BTKH, v_BTKH))
        logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)
        logits_BNTS = logits_BNTS.astype(jnp.float32) * model.head_dim**-0.5
        logits_BNTS = jnp.where(mask_TS, logits_BNTS, -1e30)
        weights_BNTS = jax.nn.softmax(logits_BNTS).astype(dtype)
        out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)
        x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", out_BTNH, w["out"])
        h_BTD = norm(x_BTD, w["norm2"])
        h_BTF = jax.nn.silu(h_BTD @ w["gate"]) * (h_BTD @ w["up"])
        return x_BTD + h_BTF @ w["down"], None

    x_BTD, _ = jax.lax.scan(
        block, params["embedding"][tokens_BT].astype(dtype), params["blocks"]
    )
    x_BTD = norm(x_BTD, params["norm"])
    output = params["output"] if "output" in params else params["embedding"].T
    logits_BTV = (x_BTD @ output.astype(dtype)).astype(jnp.float32)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1).mean()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def plain_step(model: ModelConfig, state: Any, tokens_BU: jax.Array):
    """Returns the state after an AdamW update with clipping, and the loss."""
    params, m, v, count = state
    loss, grads = jax.value_and_grad(functools.partial(plain_loss, model))(
        params, tokens_BU
    )
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), grads)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
    count = count + 1
    params = jax.tree.map(
        lambda p, m, v: (
            p
            - 1e-4
            * (
                (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.95**count)) + 1e-8)
                + 0.1 * p
            )
        ),
        params,
        m,
        v,
    )
    return (params, m, v, count), (loss, norm)


def plain_loop(config: Config) -> Generator[None]:
    """Runs a plain step each time; a few batches, already on the device, in turn."""
    rng = np.random.default_rng(0)
    shape = (4, config.data.batch_size, config.data.sequence_length + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batches = [jax.device_put(rows) for rows in tokens]
    params = plain_params(config.model, jax.random.key(0))
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    state = (params, zeros(params), zeros(params), jnp.zeros((), jnp.float32))
    previous = None
    for step in range(FOREVER):
        state, metrics = plain_step(config.model, state, batches[step % 4])
        if previous is not None:
            jax.device_get(previous)  # one step late, as the loop does
        previous = metrics
        yield


def framework_loop(config: Config) -> Generator[None]:
    """Runs a step of `train` each time, with its data, metrics and checks."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(config, Path(folder), Phases(), overwrite=False) as run,
    ):
        assert run is not None
        state = run.state
        for step in range(FOREVER):
            batch = run.next_batch(step, lambda: False)
            state, metrics = run.step(state, batch, *run.bounds(step))
            for _ in run.log(step, state, metrics):
                pass
            with run.transfers.lifted():
                yield


def main(argv: list[str]):
    del argv
    rounds, steps = absl_flags.FLAGS.rounds, absl_flags.FLAGS.steps_per_round
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = _on_random_tokens(flags.config_from_flags(), folder)
        loops = {"jaxllm": framework_loop(config), "plain": plain_loop(config)}
        for loop in loops.values():
            stack.callback(loop.close)
            for _ in range(steps):
                next(loop)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(rounds):
            for name, loop in loops.items():
                began = time.perf_counter()
                for _ in range(steps):
                    next(loop)
                times[name].append((time.perf_counter() - began) / steps)
        tokens = config.data.batch_size * config.data.sequence_length
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(
                f"{name:<8} {1e3 * median:8.2f} ms/step {tokens / median:10.0f} tok/s"
            )
        ratios = [a / b for a, b in zip(times["jaxllm"], times["plain"], strict=True)]
        print(
            f"jaxllm / plain: median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f} over {rounds} rounds"
        )


def _on_random_tokens(config: Config, folder: Path) -> Config:
    """Returns the config on one device, with tokens that it makes, never stopping."""
    rng = np.random.default_rng(0)
    end = config.model.vocab_size - 1  # of the only document
    tokens = np.append(rng.integers(0, end, 2**20 - 1), end).astype(np.uint16)
    tokens.tofile(folder / "tokens.bin")
    data = dataclasses.replace(
        config.data, paths=(str(folder / "tokens.bin"),), end_of_document=end
    )
    return dataclasses.replace(
        config,
        steps=FOREVER,
        data=data,
        mesh=MeshConfig(fsdp=1),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=FOREVER),
    )


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_integer("rounds", 15, "turns of each loop")
    absl_flags.DEFINE_integer("steps_per_round", 10, "steps a turn")
    flags.run(main)
