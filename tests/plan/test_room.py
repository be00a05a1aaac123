# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory is refused, with the bytes needed and there."""

import types
from pathlib import Path
from typing import Any

import jax
import pytest

import sharding
from jaxllm.errors import InputError
from jaxllm.plan import room
from jaxllm.step import prepare
from jaxllm.train import train


@pytest.fixture
def setup(tiny):
    return prepare(tiny(), sharding.make_mesh({"fsdp": 8}))


def test_training_needs_state_gradients_and_batch_of_all_devices(setup, monkeypatch):
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "check_room", lambda *args: seen.append(args))
    room.check_training(setup)
    room.check_parameters(setup)
    (what, training, _, _), (_, parameters, _, _) = seen
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(setup.model.abstract))
    # Whole on each device: the scales of norms, and both moments and gradients of them.
    assert weights <= parameters < 1.2 * weights
    batch = 4 * 4 * 8 * 16  # four arrays of int32
    assert 4 * weights + batch <= training < 4 * 1.2 * weights + 1.2 * batch
    assert "state, gradients and batch of config.model of" in what


def test_a_step_needs_what_it_makes_beside_its_arguments(setup, monkeypatch):
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "check_room", lambda *args: seen.append(args))
    sizes = dict(
        temp_size_in_bytes=1000, output_size_in_bytes=70, alias_size_in_bytes=60
    )
    step: Any = types.SimpleNamespace(
        memory_analysis=lambda: types.SimpleNamespace(**sizes)
    )
    room.check_step(setup, step)
    step.memory_analysis = lambda: None
    room.check_step(setup, step)
    assert [args[1] for args in seen] == [8 * 1010]


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(room, "host_bytes", lambda: 10**6)
    config = tiny({"model.vocab_size": 2**16})
    workdir: Path = tmp_path / "run"
    with pytest.raises(InputError, match=r"needs .* of memory, and there are 1 MB"):
        next(train(config, workdir))
    assert not workdir.exists()
