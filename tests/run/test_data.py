# SPDX-License-Identifier: Apache-2.0
"""The data of a run: opened once, waited for with an ear for a stop, never trusted."""

import os
import shutil
import threading

import pytest

from jaxllm.checkpoint import Checkpoints
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.preemption import Preempted
from jaxllm.data import batches, splits
from jaxllm.errors import InputError
from jaxllm.train import train


def test_a_stop_is_heard_while_data_is_waited_for(tiny, tmp_path, monkeypatch):
    come, read, phases = threading.Event(), batches._Steps.read, Phases()

    def read_late(steps, step):
        if step == 3:
            assert come.wait(120)
        return read(steps, step)

    def waits_for_step_3() -> bool:
        return phases.now == "data_wait" and phases.step == 4

    monkeypatch.setattr(batches._Steps, "read", read_late)
    config, run = tiny({"eval.every": 0}), tmp_path / "run"
    with pytest.raises(Preempted, match="3"):
        for _ in train(config, run, should_stop=waits_for_step_3, phases=phases):
            pass
    come.set()
    with Checkpoints(run / "checkpoints", config.checkpoint) as checkpoints:
        assert checkpoints.latest() == 3
    assert [record["step"] for record in train(config, run)] == [3, 4, 5]


def test_splits_are_opened_once_a_run_and_remembered(tiny, tmp_path, monkeypatch):
    opened, open_tokens = [], splits.open_tokens

    def open_and_count(path, split, **reading):
        opened.append(split)
        return open_tokens(path, split, **reading)

    monkeypatch.setattr(splits, "open_tokens", open_and_count)
    config, run = tiny(), tmp_path / "run"
    records = list(train(config, run))
    assert sum("eval_loss" in record for record in records) == 3
    assert opened == ["train", "eval"]
    with Checkpoints(run / "checkpoints", config.checkpoint) as checkpoints:
        saved = checkpoints.data(6)
    assert saved["batches"]["order_version"] == 2
    assert saved["batches"]["config.data.end_of_document"] == [256]
    assert len(saved["eval"]) == 64


def test_tokens_that_are_cut_off_under_a_run_end_it_with_their_name(
    tiny, tokens, tmp_path
):
    copy = shutil.copytree(tokens, tmp_path / "tokens")
    config = tiny({"data.paths": (str(copy),), "eval.every": 0, "steps": 50})
    records = train(config, tmp_path / "run")
    next(records)
    os.truncate(copy / "train-00000.bin", 0)
    with pytest.raises(InputError, match=r"train-00000\.bin was cut off .* resumes"):
        for _ in records:
            pass
