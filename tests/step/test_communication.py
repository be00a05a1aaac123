# SPDX-License-Identifier: Apache-2.0
"""What a step communicates on meshes of 8 and 64 H200s that are not there.

The numbers follow from the design: weights are gathered once for each pass, gradients
reduced over `fsdp` once a microbatch, over `data` once a step. Arrays of less than
`SMALL` elements, of norms and metrics, are not counted. One process compiles for all
meshes: this file, run as a program.
"""

import collections
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import jaxllm.models.mlp
import sharding
from jaxllm.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    override,
)
from jaxllm.inspect.collectives import read_collectives
from jaxllm.inspect.hlo import bytes_of
from jaxllm.step import compile_step, prepare
from pallas_kernels import offline

EXPERTS = {"model.moe.num_experts": 8, "model.moe.experts_per_token": 2}
CASES = {  # sizes of the mesh; what else is changed of CONFIG
    "fsdp 8": (dict(fsdp=8), {}),
    "data 8 x fsdp 8": (dict(data=8, fsdp=8), {}),
    "fsdp 8 x tensor 8": (dict(fsdp=8, tensor=8), {}),
    "fsdp 4 x context 2": (dict(fsdp=4, context=2), {}),
    "fsdp 4 x expert 2": (dict(fsdp=4, expert=2), EXPERTS),
    "stages": (dict(stage=2, data=2, fsdp=4, tensor=4), {}),
}
AXES = ("fsdp", "data", "tensor", "context", "expert", "stage")
LAYERS, MICROBATCHES, MATRICES = 4, 2, 7  # seven matrices a layer
LENGTH = 128
SMALL = 1000
CONFIG = Config(
    steps=10,
    model=ModelConfig(
        vocab_size=1024,
        num_layers=LAYERS,
        d_model=256,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
        d_ff=512,
    ),
    data=DataConfig(paths=("none",), sequence_length=LENGTH, batch_size=128),
    loss=LossConfig(chunk_tokens=128),
    optimizer=OptimizerConfig(name="sgd", lr=1e-3, microbatches=MICROBATCHES),
)
# Each matrix twice for each microbatch, in its two passes; embedding and output once.
GATHERS = MICROBATCHES * (LAYERS * MATRICES * 2 + 2)
SCATTERS = MICROBATCHES * (LAYERS * MATRICES + 2)
WEIGHTS = {("all-gather", "fsdp"): GATHERS, ("reduce-scatter", "fsdp"): SCATTERS}
CHUNKS = LENGTH // 8  # of a sequence each, on a device of fsdp 8
STAGES = 2
TURNS = (MICROBATCHES + STAGES - 1) * LAYERS // STAGES  # of a stage's layers, by ticks
BUDGETS = {
    "fsdp 8": WEIGHTS,
    "data 8 x fsdp 8": WEIGHTS | {("all-reduce", "data"): 1},  # of all gradients
    "fsdp 8 x tensor 8": WEIGHTS
    | {
        # Gathered: the inputs of attention and MLP, again for the weights' gradients,
        # and the gradients of their outputs; before the loss, before the embedding's
        # gradient. Added up: both outputs, both gradients; the embedding's rows.
        ("all-gather", "tensor"): MICROBATCHES * (LAYERS * 6 + 2),
        ("reduce-scatter", "tensor"): MICROBATCHES * (LAYERS * 4 + 1),
        ("all-reduce", "tensor"): CHUNKS,  # those of the loss
    },
    "fsdp 4 x context 2": WEIGHTS
    | {
        # Keys and values in two passes, a microbatch's documents, the batch in zig-zag.
        ("all-gather", "context"): MICROBATCHES * (LAYERS * 4 + 1) + 1,
        ("reduce-scatter", "context"): MICROBATCHES * LAYERS * 2,  # their gradients
        # Those of a layer's weights in one; embedding and output once a step.
        ("all-reduce", "context"): MICROBATCHES * LAYERS + 1,
    },
    "fsdp 4 x expert 2": {
        # Three matrices of experts; four of attention, embedding and output are cut by
        # both axes, as is the gradient of the router.
        ("all-gather", "fsdp"): MICROBATCHES * LAYERS * 3 * 2,
        ("reduce-scatter", "fsdp"): MICROBATCHES * LAYERS * 3,
        ("all-gather", "fsdp expert"): MICROBATCHES * (LAYERS * 4 * 2 + 2),
        ("reduce-scatter", "fsdp expert"): MICROBATCHES * (LAYERS * 5 + 2),
        # Tokens with their shares and choices, backward with the gradient too; what
        # comes back, backward with that of the shares too.
        ("all-gather", "expert"): MICROBATCHES * LAYERS * (3 + 4),
        ("reduce-scatter", "expert"): MICROBATCHES * LAYERS * (1 + 2),
    },
    # Embedding, loss and sums over data are of the whole batch.
    "stages": {
        ("all-gather", "fsdp"): TURNS * MATRICES * 2 + 2,
        ("reduce-scatter", "fsdp"): TURNS * MATRICES + 2,
        ("all-reduce", "data"): 1,
        ("all-gather", "tensor"): TURNS * 6 + 2,
        ("reduce-scatter", "tensor"): TURNS * 4 + 1,
        ("all-reduce", "stage tensor"): CHUNKS,
        # There and back; the embedding's rows, the output, the input's gradient.
        ("collective-permute", "stage"): 2 * (MICROBATCHES + STAGES - 1),
        ("all-reduce", "stage"): 3,
    },
}
PLANTED = "planted"
FAST = "--xla_backend_optimization_level=0 --xla_gpu_enable_triton_gemm=false"

Key = tuple[str, str]  # kind, axes


@dataclasses.dataclass(frozen=True)
class Moved:
    """An array that an instruction moves, `times` a step."""

    kind: str
    axes: str
    array: str
    times: int
    wire_bytes: float  # that a device sends each time
    source: str

    @property
    def key(self) -> Key:
        return self.kind, self.axes


def moved(sizes: dict[str, int], changes: dict[str, Any]) -> list[Moved]:
    """Compiles a step for described devices; needs their compiler in the process."""
    devices = offline.described_devices(math.prod(sizes.values()))
    config = override(CONFIG, changes)
    setup = prepare(config, sharding.make_mesh(sizes, devices))
    text = compile_step(setup).as_text()
    assert text is not None
    return [
        Moved(
            kind=c.kind,
            axes=" ".join(c.axes or "?"),
            array=array,
            times=c.count or 1,
            wire_bytes=c.wire_bytes * bytes_of(array) / c.num_bytes,
            source=c.source,
        )
        for c in read_collectives(text, setup.mesh)
        for array in c.arrays
        if _num_elements(array) >= SMALL
    ]


def _num_elements(array: str) -> int:
    return math.prod(map(int, re.findall(r"\d+", array.partition("[")[2])))


def faults(found: list[Moved], budget: dict[Key, int]) -> list[str]:
    """Returns what is not as in the budget, with the lines that asked for it."""
    counts = collections.Counter()
    for array in found:
        counts[array.key] += array.times
    return [
        f"{' '.join(key)}: {counts[key]} arrays a step, not {budget.get(key, 0)}: "
        + "; ".join(f"{m.array} by {m.source}" for m in found if m.key == key)
        for key in sorted({*counts, *budget})
        if counts[key] != budget.get(key, 0)
    ]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def compiled(run_offline) -> dict[str, list[Moved]]:
    ended = run_offline([__file__], XLA_FLAGS=FAST)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    return {name: [Moved(**m) for m in arrays] for name, arrays in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_communicates_what_the_design_says(compiled, name):
    assert faults(compiled[name], BUDGETS[name]) == []


def formulas(sizes: dict[str, int], config: Config) -> dict[Key, float]:
    """Returns the bytes that a device sends in a step, as in docs/communication.md."""
    f, r, t, c, x, p = (sizes.get(axis, 1) for axis in AXES)
    model, d, parts = config.model, config.model.d_model, MICROBATCHES
    passes = parts + p - 1  # of a device's layers: one for each tick
    experts = LAYERS * 3 * model.moe.num_experts * d * model.d_ff_expert / x
    dense = 0 if experts else 3 * d * model.d_ff
    weights = LAYERS * (4 * d * d + dense) / (t * p)
    tables = 2 * model.vocab_size * d / (t * p)
    tables_passes = parts if p == 1 else 1
    whole = parts * weights + tables
    tokens = config.data.batch_size / (parts * r * f * x) * LENGTH / c
    stream = 2 * tokens * d  # bytes of a device's microbatch, bfloat16
    layers = passes * LAYERS / p
    chosen = model.moe.experts_per_token
    shards = "fsdp expert" if x > 1 else "fsdp"
    sent: dict[Key, float] = collections.defaultdict(float)
    sent["all-gather", "fsdp"] = 4 * passes * experts * (1 - 1 / f)
    sent["reduce-scatter", "fsdp"] = 4 * passes * experts * (1 - 1 / f)
    gathered = 2 * (2 * passes * weights + tables_passes * tables)
    reduced = 4 * (passes * weights + tables_passes * tables)
    sent["all-gather", shards] += gathered * (1 - 1 / (f * x))
    sent["reduce-scatter", shards] += reduced * (1 - 1 / (f * x))
    sent["all-reduce", "data"] = 8 * (weights + tables) / f * (1 - 1 / r)
    sent["all-gather", "tensor"] = (6 * layers + 2 * parts) * stream * (1 - 1 / t)
    sent["reduce-scatter", "tensor"] = (4 * layers + parts) * stream * (1 - 1 / t)
    in_loss = "stage tensor" if p > 1 else "tensor"
    sent["all-reduce", in_loss] = 4 * parts * stream * (1 - 1 / (t * p))
    # Keys are as wide as the stream here. And 16 bytes a token of the batch.
    keys = 4 * LAYERS * parts * stream
    sent["all-gather", "context"] = (c - 1) * (keys + 8 / d * parts * stream)
    sent["reduce-scatter", "context"] = (c - 1) * keys
    sent["all-reduce", "context"] = 8 * whole / f * (1 - 1 / c)
    routed = (x - 1) * parts * LAYERS * tokens
    sent["all-gather", "expert"] = routed * (6 * d + 16 * chosen)
    sent["reduce-scatter", "expert"] = routed * (4 * d + 4 * chosen)
    sent["collective-permute", "stage"] = 2 * passes * stream / t
    sent["all-reduce", "stage"] = 6 * parts * stream / t * (1 - 1 / p)
    return sent


@pytest.mark.parametrize("name", CASES)
def test_a_device_sends_the_bytes_of_the_formulas(compiled, name):
    sent = collections.Counter()
    for array in compiled[name]:
        sent[array.key] += array.times * array.wire_bytes
    sizes, changes = CASES[name]
    expected = formulas(sizes, override(CONFIG, changes))
    # One percent: norms, routers, documents, and what goes with others in one array.
    assert dict(sent) == pytest.approx({k: expected[k] for k in sent}, rel=0.01)


def test_an_added_collective_is_named_by_its_line(compiled):
    lines = Path(__file__).read_text().splitlines()
    number = 1 + next(
        i for i, line in enumerate(lines) if line.endswith("# planted line")
    )
    found = faults(compiled[PLANTED], BUDGETS["fsdp 8"])
    assert len(found) == 1
    assert found[0].startswith("all-reduce fsdp: ")
    assert f"{Path(__file__).name}:{number}" in found[0]


def plant() -> None:
    """Makes every MLP add up activations over the devices."""
    run = jaxllm.models.mlp.MLP.__call__

    def run_less_mean(self: Any, x_BTD: Any) -> Any:
        return run(self, x_BTD - x_BTD.mean(axis=0, keepdims=True))  # planted line

    jaxllm.models.mlp.MLP.__call__ = run_less_mean


def main() -> None:
    found = {name: moved(*case) for name, case in CASES.items()}
    plant()
    found[PLANTED] = moved(*CASES["fsdp 8"])
    json.dump(
        {n: [dataclasses.asdict(m) for m in f] for n, f in found.items()}, sys.stdout
    )


if __name__ == "__main__":
    main()
