# SPDX-License-Identifier: Apache-2.0
"""A run that was left and resumed is, bit for bit, the run that was not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config import Config, override
from jaxllm.config.files import config_to_dict
from jaxllm.errors import InputError
from jaxllm.step import prepare
from jaxllm.train import train

LOSS_RTOL = 1e-5  # of a few float32 steps whose sums have another order


def end(workdir: Path, config: Config) -> list[bytes]:
    """Returns the bytes of every array of the last state."""
    return [leaf.tobytes() for leaf in jax.tree.leaves(state_at(workdir, config, None))]


def state_at(workdir: Path, config: Config, step: int | None):
    setup = prepare(config, sharding.make_mesh(config.mesh.sizes))
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        step = checkpoints.latest() if step is None else step
        assert step is not None
        return jax.device_get(checkpoints.restore(step, setup.abstract_state)[0])


def losses(workdir: Path) -> list[tuple]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


@pytest.fixture
def config(tiny) -> Config:
    return tiny({"checkpoint.keep_best": True})


@pytest.mark.parametrize(
    "after", [(0,), pytest.param((1, 2), marks=pytest.mark.slow), (3, 3, 4), (5,)]
)
def test_leaving_the_loop_saves_and_resuming_changes_nothing(
    config, trained, tmp_path, after
):
    for step in after:
        for record in train(config, tmp_path):
            if record["step"] >= step:
                break
    for _ in train(config, tmp_path):
        pass
    assert end(tmp_path, config) == end(trained, config)
    assert losses(tmp_path) == losses(trained)


def test_leaving_the_loop_loses_no_step(config, tmp_path):
    records = train(config, tmp_path)
    for record in records:
        if record["step"] == 3:
            break
    records.close()
    with Checkpoints(tmp_path / CHECKPOINTS, config.checkpoint) as checkpoints:
        saved = checkpoints.latest()
    assert saved is not None and saved >= 4
    assert max(step for step, loss, _ in losses(tmp_path) if loss) == saved - 1


def test_an_interruption_of_the_consumer_saves_and_resuming_changes_nothing(
    config, trained, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        for record in train(config, tmp_path):
            if record["step"] == 3:
                raise KeyboardInterrupt
    first, *_ = train(config, tmp_path)
    assert first["step"] >= 4
    assert end(tmp_path, config) == end(trained, config)
    assert losses(tmp_path) == losses(trained)


def test_an_error_of_the_consumer_leaves_a_run_that_can_be_resumed(
    config, trained, tmp_path
):
    with pytest.raises(ZeroDivisionError):
        for record in train(config, tmp_path):
            if record["step"] == 5:
                raise ZeroDivisionError
    for _ in train(config, tmp_path):
        pass
    assert end(tmp_path, config) == end(trained, config)
    assert losses(tmp_path) == losses(trained)


def test_half_a_save_is_passed_over(config, trained, tmp_path, caplog):
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / CHECKPOINTS / "6" / "state" / "d")
    first, *_ = train(config, workdir)
    assert first["step"] == 4
    assert "6 is not a whole checkpoint: no state/d" in caplog.text
    assert end(workdir, config) == end(trained, config)
    assert losses(workdir) == losses(trained)


def test_without_its_config_a_run_is_not_resumed_with_another_seed(
    tiny, config, trained, tmp_path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "config.json").unlink()
    with pytest.raises(InputError, match=r"step 6 was saved .* config\.seed: 0 -> 1"):
        next(train(override(config, {"steps": 8, "seed": 1}), workdir))
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 8, "fsdp": 1, "tensor": 1},
    ],
)
def test_a_run_goes_on_with_another_mesh(tiny, config, trained, tmp_path, mesh):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    changed = {f"mesh.{axis}": size for axis, size in mesh.items()}
    longer = {"steps": 8, "checkpoint.keep_best": True}
    other = tiny({**longer, **changed})
    assert end(tmp_path, other) == end(trained, config)
    for _ in train(other, tmp_path):
        pass
    reference = shutil.copytree(trained, tmp_path / "same")
    for _ in train(tiny(longer), reference):
        pass
    assert_close(losses(tmp_path), losses(reference))


def test_a_run_of_eight_devices_goes_on_with_one(
    tiny, config, trained, tmp_path, run_command
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    reference = shutil.copytree(trained, tmp_path / "reference")
    ended = run_command("train --workdir run --config.steps=8", tmp_path)
    assert ended.status == 0, ended.stderr
    for _ in train(tiny({"steps": 8, "checkpoint.keep_best": True}), reference):
        pass
    assert_close(losses(workdir), losses(reference))


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(tiny, tmp_path):
    """Runs scripts/chaos.py, which says what it compares."""
    config = tiny({"steps": 60, "eval.every": 20, "checkpoint.every": 15})
    (tmp_path / "config.py").write_text(
        "from jaxllm.config.files import config_from_dict\n"
        f"def get_config():\n    return config_from_dict({config_to_dict(config)!r})\n"
    )
    script = Path(__file__).parents[2] / "scripts" / "chaos.py"
    ended = subprocess.run(
        [
            sys.executable,
            str(script),
            "--config=config.py",
            "--processes=1",
            "--events=3",
        ],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bitwise equal" in ended.stdout


def assert_close(one: list[tuple], other: list[tuple]):
    assert [step for step, *_ in one] == [step for step, *_ in other]
    values = [np.array([(a or 0, b or 0) for _, a, b in side]) for side in (one, other)]
    np.testing.assert_allclose(*values, rtol=LOSS_RTOL)
