# SPDX-License-Identifier: Apache-2.0
"""A run goes on with another number of processes: the same batches, exactly.

Every process writes down the parts of the batches that its devices hold. Three mixed
paths, packed; the same devices in all, whatever the number of processes. PROCESSES in
the environment changes the numbers: PROCESSES="4 2 3 1" takes about a minute.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxllm import tokenize
from jaxllm.checkpoint import find_steps
from jaxllm.config import Config
from jaxllm.data.packing import BATCH_NAMES

pytestmark = pytest.mark.slow

NUMBERS = [int(number) for number in os.environ.get("PROCESSES", "3 2 1").split()]
NUM_DEVICES = math.lcm(3, *NUMBERS)
STEPS = 2 * len(NUMBERS) + 2
SHAPE = (12, 32)  # of a batch
RTOL = 5e-7  # a few units in the last place of float32
RECORDING = """
import os, signal, sys
import jax, numpy as np
from jaxllm import flags, train
from jaxllm.run.data import RunData

folder, stop_at = os.environ["RECORD"], int(os.environ["STOP_AT"])
batches_of = RunData.batches

class Recorded:
    def __init__(self, batches, step):
        self.batches, self.step = batches, step
    def close(self):
        self.batches.close()
    def wait(self, should_stop):
        batch = self.batches.wait(should_stop)
        whole = {}
        for name, x in batch.items():
            whole[name] = np.full(x.shape, -9, np.int32)  # -9: not held here
            for shard in x.addressable_shards:
                whole[name][shard.index] = shard.data
        np.savez(f"{folder}/{self.step}-{jax.process_index()}.npz", **whole)
        if self.step == stop_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        self.step += 1
        return batch

RunData.batches = lambda data, start, left_out: Recorded(
    batches_of(data, start, left_out), start
)
sys.argv[0] = train.__file__
train.define_flags()
flags.run(train.main)
"""


@pytest.fixture
def config(tiny, tmp_path) -> Config:
    """The config that mixes three sets of tokens."""
    paths = []
    for name, length in {"short": 2, "middle": 5, "long": 9}.items():
        texts = [" ".join(f"{name}{n * k}" for k in range(length)) for n in range(150)]
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        paths.append(str(tmp_path / name))
        flags = f"--input={tmp_path / name}.jsonl --output={paths[-1]} --workers=1"
        assert tokenize.main(["tokenize", *flags.split()]) == 0
    return tiny(
        {
            **{"steps": STEPS, "eval.every": 0, "checkpoint.every": 100},
            **{"data.paths": tuple(paths), "data.weights": (0.5, 0.3, 0.2)},
            **{"data.batch_size": SHAPE[0], "data.sequence_length": SHAPE[1]},
            **{
                "mesh.data": 3,
                "mesh.fsdp": NUM_DEVICES // 3,
                "logging.tensorboard": False,
            },
        }
    )


@pytest.fixture
def live(config, tmp_path, start_processes):
    """Trains in some processes, one of which is stopped at a step; returns statuses."""

    def live(run: str, number: int, stop_at: int) -> list[int]:
        record = tmp_path / f"{run}-batches"
        record.mkdir(exist_ok=True)
        return start_processes(
            config,
            tmp_path,
            number,
            NUM_DEVICES // number,
            run,
            python=("-c", RECORDING),
            env={"RECORD": str(record), "STOP_AT": str(stop_at)},
        ).wait()

    return live


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def batches(folder: Path, steps: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Returns the whole batch of each step, put together from all processes."""
    found = []
    for step in steps:
        batch = {}
        for path in folder.glob(f"{step}-*.npz"):
            for name, part in np.load(path).items():
                batch.setdefault(name, np.full(SHAPE, -9, np.int32))
                held = part != -9
                known = held & (batch[name] != -9)
                assert (part == batch[name])[known].all()  # who shares a row agrees
                batch[name][held] = part[held]
        assert batch and all((x != -9).all() for x in batch.values())
        found.append(batch)
    return found


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


def test_batches_and_losses_are_those_of_one_process(live, tmp_path):
    assert live("calm", 1, stop_at=STEPS) == [0], said(tmp_path)
    *others, last = NUMBERS
    for life, number in enumerate(others):
        ends = live("moved", number, stop_at=2 * life + 1)
        assert ends == [75] * number, said(tmp_path)
        (*_, saved), faults = find_steps(tmp_path / "moved" / "checkpoints")
        assert 2 * life + 1 < saved < STEPS and not faults
    assert live("moved", last, stop_at=STEPS) == [0] * last, said(tmp_path)
    calm = batches(tmp_path / "calm-batches", range(STEPS))
    moved = batches(tmp_path / "moved-batches", range(STEPS))
    for one, other in zip(calm, moved, strict=True):
        for name in BATCH_NAMES:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert any(batch["segments"].max() > 1 for batch in calm)  # packed documents
    # Between processes, sums over three devices are added up in another order.
    one, other = losses(tmp_path / "calm"), losses(tmp_path / "moved")
    np.testing.assert_allclose(one, other, rtol=RTOL)
