# SPDX-License-Identifier: Apache-2.0
"""A step looked at again: the numbers it had, and where a bad one begins."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import sharding
from jaxllm.errors import InputError
from jaxllm.inspect.diagnosis import diagnose
from jaxllm.replay import describe, replay
from jaxllm.run.data import open_train_data
from jaxllm.step import init_state, prepare

RTOL = 1e-5  # float32 sums of another program


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def logged(workdir: Path, step: int) -> dict[str, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    (line,) = [line for line in lines if line["step"] == step and "loss" in line]
    return line


@pytest.mark.parametrize(("step", "saved_step"), [(5, 4), (1, 0)])
def test_a_step_has_the_numbers_that_it_had(tiny, trained, step, saved_step):
    config = tiny({"checkpoint.keep_best": True})
    before, line = contents(trained), logged(trained, step)
    found = replay(trained, config, step, None)
    assert (found.batch, found.saved_step) == (step, saved_step)
    means = found.diagnosis.means
    assert means["loss"] == pytest.approx(line["loss"], rel=RTOL)
    assert means["num_targets"] == line["num_targets"]
    squares = [np.square(norms).sum() for norms in found.diagnosis.gradients.values()]
    assert math.sqrt(sum(squares)) == pytest.approx(line["grad_norm"], rel=RTOL)
    assert len(found.diagnosis.activations) == config.model.num_layers + 1
    text = describe(found)
    assert text.splitlines()[-1] == "all of it is finite"
    assert f"step {step} with batch {step}" in text
    assert contents(trained) == before


@pytest.fixture(scope="module")
def first(tiny):
    """A model before its first step, and the batch of that."""
    config = tiny({"data.batch_size": 16})
    setup = prepare(config, sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    with open_train_data(setup).batches() as batches:
        return setup, init_state(setup).params, next(batches)


def changed(params, path: tuple[str, ...], where, value: float):
    """Returns parameters with one number of one of them changed, placed as before."""

    def change(at, leaf):
        if tuple(key.key for key in at) != path:
            return leaf
        values = np.array(jax.device_get(leaf))
        values[where] = value
        return jax.device_put(values, leaf.sharding)

    return jax.tree_util.tree_map_with_path(change, params)


def test_the_layer_is_found_from_which_on_numbers_are_not_finite(first):
    setup, params, batch = first
    sound = diagnose(setup, params, batch)
    assert np.isfinite(sound.activations).all()
    row_means = sound.row_losses
    counts = np.asarray(batch["targets"] >= 0).sum(1)
    mean = (row_means * counts).sum() / counts.sum()
    assert mean == pytest.approx(sound.means["loss"], rel=RTOL)
    layer = ("blocks", "0", "mlp", "down")
    bad = diagnose(setup, changed(params, layer, (1, 0, 0), math.inf), batch)
    np.testing.assert_allclose(bad.activations[:2], sound.activations[:2])
    assert np.isfinite(bad.activations).tolist() == [True, True, False]


def test_the_rows_are_found_whose_tokens_make_a_loss_that_is_not_finite(first):
    setup, params, batch = first
    tokens = np.asarray(batch["tokens"])
    counts = {int(t): (tokens == t).any(1).sum() for t in np.unique(tokens)}
    token = min(counts, key=lambda t: abs(counts[t] - 4))
    is_bad = np.zeros(len(tokens), bool) | (tokens == token).any(1)
    assert 0 < is_bad.sum() < len(tokens)
    config = dataclasses.replace(setup.config.model, tie_embeddings=False)
    assert config == setup.config.model, "its input must not be its output"
    path = ("embedding",)
    found = diagnose(setup, changed(params, path, token, math.nan), batch)
    reached = np.zeros_like(tokens, bool)
    for row, (ids, targets) in enumerate(
        zip(tokens, np.asarray(batch["targets"]), strict=True)
    ):
        segments = np.asarray(batch["segments"])[row]
        for at in np.flatnonzero(ids == token):
            seen = (segments == segments[at]) & (np.arange(len(ids)) >= at)
            reached[row] |= seen & (targets >= 0)
    assert np.isfinite(found.row_losses).tolist() == (~reached.any(1)).tolist()
    assert not np.isfinite(found.activations).any()


def test_the_command_says_what_it_found_and_refuses_what_is_not_there(
    tiny, trained, tmp_path, run_command
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = contents(workdir)
    ended = run_command("replay --workdir run --step 5", tmp_path)
    assert (ended.status, ended.stderr) == (0, "")
    said = ended.stdout.splitlines()
    assert said[0] == "step 5 with batch 5, from the save of step 4"
    assert sum(line.startswith("  row ") for line in said) == 5
    assert any(line.startswith("  blocks/0/attention/query") for line in said)
    assert contents(workdir) == before
    for wrong, what in (
        ("--step 6", "--step=6 must be from 0 to config.steps=6 less 1"),
        ("", "--step is missing"),
    ):
        ended = run_command(f"replay --workdir run {wrong}", tmp_path)
        assert ended.status == 2 and what in ended.stderr
    with pytest.raises(InputError, match="batches would not be those of the run"):
        replay(workdir, tiny({"data.batch_size": 16}), 5, None)
