# SPDX-License-Identifier: Apache-2.0
"""The loop: what it yields, writes and saves, when, and what it leaves alone."""

import json
import logging
import math
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.cluster.preemption import Preempted
from jaxllm.config.saved import read_config
from jaxllm.errors import InputError
from jaxllm.run.rate_change import warn_of_rate
from jaxllm.step import prepare
from jaxllm.train import dry_run, due, train


def lines(workdir: Path) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def in_json(records: list[dict]) -> list[dict]:
    """Returns records with null for what is no number, such as `mfu` on a CPU."""
    return [
        {name: value if math.isfinite(value) else None for name, value in r.items()}
        for r in records
    ]


def steps_with(name: str, records: list[dict]) -> list[int]:
    return [record["step"] for record in records if name in record]


def saved_steps(workdir: Path, config) -> list[int]:
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        return checkpoints.steps()


def contents(workdir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
    }


def test_what_is_yielded_is_what_is_written(tiny, tmp_path):
    records = list(train(tiny(), tmp_path))
    assert in_json(records) == lines(tmp_path)
    assert steps_with("loss", records) == [0, 1, 2, 3, 4, 5]
    assert steps_with("eval_loss", records) == [2, 4, 6]
    promised = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "mfu", "step_s"}
    for record in records:
        assert {"step", "eval_loss"} == set(record) or promised < set(record)
    logged = [record for record in records if "loss" in record]
    assert all(0 <= r["data_wait_s"] and 0 < r["step_s"] for r in logged)
    # Waiting for a batch falls into the time of the step before, which runs meanwhile.
    assert sum(r["data_wait_s"] for r in logged) <= sum(r["step_s"] for r in logged)
    assert read_config(tmp_path) == tiny()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_an_evaluation_comes_before_the_update_of_its_step(trained):
    order = [
        (r["step"], "eval" if "eval_loss" in r else "loss") for r in lines(trained)
    ]
    first = order.index((2, "eval"))
    assert order[first - 1 : first + 2] == [(1, "loss"), (2, "eval"), (2, "loss")]
    assert order[-1] == (6, "eval")


def test_the_loss_falls(tiny, tmp_path):
    config = tiny({"steps": 60, "eval.every": 0, "checkpoint.every": 60})
    losses = [record["loss"] for record in train(config, tmp_path)]
    assert losses[0] == pytest.approx(math.log(config.model.vocab_size), abs=0.2)
    assert losses[-1] < losses[0] - 1.5


def test_logging_and_evaluation_happen_as_often_as_asked(tiny, tmp_path):
    overrides = {"logging.every": 4, "eval.every": 0, "logging.tensorboard": False}
    config = tiny(overrides)
    records = list(train(config, tmp_path))
    assert steps_with("loss", records) == [0, 4]
    assert steps_with("eval_loss", records) == []
    assert saved_steps(tmp_path, config) == [4, 6]
    assert not (tmp_path / "tensorboard").exists()
    assert [step for step in range(10) if due(step, 4)] == [4, 8]
    assert not any(due(step, 0) for step in range(10))


def test_the_best_save_is_kept_by_its_eval_loss(tiny, tmp_path):
    # A learning rate that first helps and then destroys.
    config = tiny(
        {
            "steps": 8,
            "optimizer.warmup_steps": 8,
            "optimizer.lr": 5.0,
            "optimizer.name": "sgd",
            "optimizer.clip_norm": None,
            "checkpoint.keep_best": True,
            "checkpoint.keep_latest": 1,
        }
    )
    records = list(train(config, tmp_path))
    losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    assert saved_steps(tmp_path, config) == sorted({best, 8})
    with Checkpoints(tmp_path / CHECKPOINTS, config.checkpoint) as checkpoints:
        assert checkpoints.best() == best


def test_an_evaluation_that_is_the_best_so_far_is_saved_where_it_was(tiny, tmp_path):
    changes = {"steps": 9, "eval.every": 2, "checkpoint.every": 5}
    config = tiny(
        {**changes, "checkpoint.keep_best": True, "checkpoint.keep_latest": 9}
    )
    for record in train(config, tmp_path):
        if record["step"] == 3:
            break  # and resume
    records = [*lines(tmp_path), *train(config, tmp_path)]
    losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    bests = {
        s for s in losses if losses[s] < min([9, *(losses[p] for p in losses if p < s)])
    }
    assert set(saved_steps(tmp_path, config)) == {4, 5, 9} | bests
    with Checkpoints(tmp_path / CHECKPOINTS, config.checkpoint) as checkpoints:
        assert checkpoints.best() == min(losses, key=lambda step: losses[step])


def test_the_best_cannot_be_kept_without_evaluations(tiny):
    with pytest.raises(
        InputError, match=r"keep_best=True needs .* config\.eval\.every=0"
    ):
        tiny({"checkpoint.keep_best": True, "eval.every": 0})


def test_a_finished_run_changes_nothing_and_says_so(tiny, trained, caplog):
    before = contents(trained)
    with caplog.at_level(logging.INFO, "jaxllm"):
        assert list(train(tiny({"checkpoint.keep_best": True}), trained)) == []
    assert contents(trained) == before
    assert "finished its 6 steps; go on with --config.steps=12, say" in caplog.text


def test_more_steps_go_on_with_a_finished_run(tiny, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = tiny({"steps": 8, "checkpoint.keep_best": True})
    records = list(train(config, workdir))
    assert steps_with("loss", records) == [6, 7]
    assert steps_with("loss", lines(workdir)) == list(range(8))
    assert read_config(workdir) == config


def test_a_learning_rate_that_jumps_at_a_resume_is_said(tiny, trained, caplog):
    def warned(changes) -> str:
        caplog.clear()
        warn_of_rate(trained, tiny({"checkpoint.keep_best": True, **changes}), 6)
        return caplog.text

    assert warned({}) == warned({"optimizer.clip_norm": 3.0}) == ""
    assert "the learning rate at step 6 rises from 0.001 to 0.006" in warned(
        {"steps": 12}
    )
    advice = {"optimizer.schedule": "constant", "optimizer.lr": 0.001}  # as it says
    assert warned({"steps": 12, **advice}) == ""
    assert "falls from 0.001 to 0.0001" in warned({**advice, "optimizer.lr": 1e-4})


def test_fewer_steps_than_saved_are_refused(tiny, trained):
    before = contents(trained)
    with pytest.raises(InputError, match=r"config\.steps=5 is below the saved step 6"):
        list(train(tiny({"steps": 5}), trained))
    assert contents(trained) == before


def test_overwriting_begins_again_and_removes_only_what_a_run_writes(
    tiny, trained, tmp_path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "notes.txt").write_text("mine")
    config = tiny({"steps": 3, "seed": 1, "eval.every": 0})
    records = list(train(config, workdir, overwrite=True))
    assert steps_with("loss", lines(workdir)) == [0, 1, 2]
    assert in_json(records) == lines(workdir)
    assert saved_steps(workdir, config) == [2, 3]
    assert (workdir / "notes.txt").read_text() == "mine"
    assert len(list((workdir / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("lr", "weight_decay", "first"),
    [
        (1e30, 0.0, "the loss is .* not finite in .* parameters, first in "),
        # The update itself overflows: no metric of its step can show it.
        (1e10, 1e35, "its loss and gradient are finite, but .* not, first params/"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_and_is_never_saved(
    tiny, tmp_path, lr, weight_decay, first
):
    config = tiny(
        {
            "optimizer.lr": lr,
            "optimizer.weight_decay": weight_decay,
            "optimizer.warmup_steps": 0,
            "optimizer.name": "sgd",
            "optimizer.clip_norm": None,
            "checkpoint.every": 1,
        }
    )
    with pytest.raises(FloatingPointError, match=rf"^step \d: {first}") as error:
        list(train(config, tmp_path))
    step = int(str(error.value)[5])
    assert "config.optimizer.lr" in str(error.value)
    assert (tmp_path / "metrics.jsonl").exists()
    assert all(record["step"] <= step for record in lines(tmp_path))
    setup = prepare(config, sharding.make_mesh({"fsdp": 8}))
    with Checkpoints(tmp_path / CHECKPOINTS, config.checkpoint) as checkpoints:
        for saved in checkpoints.steps():
            state, _ = checkpoints.restore(saved, setup.abstract_state)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_wish_to_stop_is_honoured_between_two_steps(tiny, tmp_path):
    seen = []
    with pytest.raises(Preempted) as stop:
        for record in train(tiny(), tmp_path, should_stop=lambda: len(seen) > 2):
            seen.append(record)
    step = stop.value.args[0]
    assert saved_steps(tmp_path, tiny())[-1] == step
    assert steps_with("loss", lines(tmp_path)) == list(range(step))


def test_the_consumer_keeps_its_own_settings_and_threads(tiny, tmp_path):
    def surroundings():
        return (
            jax.config.jax_transfer_guard,
            jax.sharding.get_abstract_mesh(),
            jax.config.jax_numpy_dtype_promotion,
            logging.getLogger().handlers[:],
        )

    before, threads = surroundings(), set(threading.enumerate())
    records = train(tiny(), tmp_path)
    for record in records:
        assert surroundings() == before
        if record["step"] == 3:
            break
    records.close()
    assert surroundings() == before
    left = [t for t in set(threading.enumerate()) - threads if not t.daemon]
    for thread in left:  # Orbax's loops do not wait for theirs as they close
        thread.join(30)
    assert not [thread for thread in left if thread.is_alive()]


def test_the_step_and_the_evaluation_are_compiled_once(tiny, tmp_path, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        list(train(tiny(), tmp_path))
    compiled = [m for m in caplog.messages if m.startswith("Compiling jit(")]
    names = [message.split("jit(")[1].split(")")[0] for message in compiled]
    assert names.count("train_step") == 1
    assert names.count("eval_step") == 1
    # Nothing compiles in between: all of it happens before the first update.
    assert len(names) == len(set(names)), names


@pytest.mark.parametrize(
    ("config", "workdir", "message"),
    [
        (
            {"steps": 3},
            "run",
            r"config is of type dict, .* jaxllm\.config\.load_config",
        ),
        ("run.py", "run", r"config is of type str, .* jaxllm\.config\.load_config"),
        (None, None, r"workdir is None, .* such as 'runs/first'"),
        (None, 3, r"workdir is 3, .* such as 'runs/first'"),
    ],
)
def test_arguments_of_another_type_are_refused(tiny, config, workdir, message):
    with pytest.raises(TypeError, match=message):
        next(train(config or tiny(), workdir))


@pytest.mark.parametrize(
    "workdir", ["gs://b/run", Path("s3://b/run"), "r\udcff", "a\0"]
)
def test_a_directory_that_cannot_be_saved_into_is_refused_at_once(tiny, workdir):
    with pytest.raises(InputError, match=r"is a URL, .* mount it|is not UTF-8 text"):
        next(train(tiny(), workdir))


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = dry_run(tiny({"model.d_model": 24, "data.paths": ("nowhere",)}))
    for fragment in (
        "mesh {'fsdp': 8}",
        "blocks/0/attention/query",
        "parameters ",
        "MiB a device",
        "optimizer state",
        "FLOPs a token",
        "tokens in all    768",
        "attention: xla (auto: ",
    ):
        assert fragment in text
    assert list(tmp_path.iterdir()) == []
