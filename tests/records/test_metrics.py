# SPDX-License-Identifier: Apache-2.0
"""Metrics: read late, written once a step, on files that survive a resume."""

import contextlib
import errno
import json
import math
import os
import statistics
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxllm.config import LoggingConfig
from jaxllm.errors import InputError
from jaxllm.records import metrics as metrics_module
from jaxllm.records.metrics import MetricsWriter, device_memory_bytes

JSONL_ONLY = LoggingConfig(tensorboard=False)


def writer(workdir, resume_step=0, config=JSONL_ONLY):
    return MetricsWriter(workdir, config, run_name="run", resume_step=resume_step)


def read(workdir):
    return [json.loads(s) for s in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_each_write_is_one_line_on_disk_at_once(tmp_path):
    with writer(tmp_path / "new" / "run") as out:
        for step in range(3):
            record = out.write(step, {"loss": float(np.float32(1.1)), "num": 7})
            assert record == {"step": step, "loss": np.float32(1.1), "num": 7.0}
            assert read(tmp_path / "new" / "run")[-1] == record
    assert len(read(tmp_path / "new" / "run")) == 3


def test_numbers_that_json_lacks_are_null_in_the_file_only(tmp_path):
    with writer(tmp_path) as out:
        record = out.write(0, {"loss": float("nan"), "max": float("inf"), "lr": 0.1})
    assert math.isnan(record["loss"]) and record["max"] == math.inf
    assert read(tmp_path) == [{"step": 0, "loss": None, "max": None, "lr": 0.1}]


@pytest.mark.parametrize("resume_step", [0, 3, 4, 6, 99])
@pytest.mark.parametrize("cut", [0, 1, 12])
def test_a_resumed_run_has_every_step_once(tmp_path, resume_step, cut):
    with writer(tmp_path) as out:
        for step in range(6):
            out.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)  # what a kill may leave
    with writer(tmp_path, resume_step) as out:
        for step in range(resume_step, resume_step + 3):
            out.write(step, {"loss": step})
    steps = [record["step"] for record in read(tmp_path)]
    left = range(min(resume_step, 5 if cut > 1 else 6))
    assert steps == [*left, *range(resume_step, resume_step + 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_that_are_not_ours_are_left_as_they_are(tmp_path):
    strange = b'# a note\n{"step": "x"}\n{"note": 1}\n[1]\n{"step": 1,\n\xff\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + strange + b'{"step": 7}\n{"step": 8, "lo')
    writer(tmp_path, 5).close()
    assert path.read_bytes() == b'{"step": 0}\n' + strange


def test_a_file_without_lost_lines_is_not_rewritten(tmp_path):
    with writer(tmp_path) as out:
        out.write(0, {})
    before = (tmp_path / "metrics.jsonl").stat()
    writer(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").stat() == before


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with writer(tmp_path, config=LoggingConfig(wandb_project="p")) as out:
        assert out.write(1, {"loss": 2}) == {"step": 1, "loss": 2.0}
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = metrics_module._open_jsonl
    with pytest.raises(OSError) as caught:
        with contextlib.ExitStack() as opened:
            log(tmp_path / "metrics.jsonl", opened)(0, {"loss": 1.0})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_tensorboard_shows_the_same_scalars_and_each_step_once(tmp_path):
    config = LoggingConfig(tensorboard=True)
    for first in (0, 3):
        with writer(tmp_path, first, config) as out:
            for step in range(first, 5):
                out.write(step, {"loss": first + step / 2, "bad": float("nan")})
        time.sleep(0.01)  # event files are read in the order of their names
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["bad", "loss"]
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(r["step"], r["loss"]) for r in read(tmp_path)]
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert math.isnan(events.Scalars("bad")[0].value)


def test_tensorflow_is_never_imported_and_no_thread_is_started(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow imported')")
    code = (
        "import sys, threading, pathlib, jax, jaxllm.records.metrics as m\n"
        "jax.devices(); before = set(threading.enumerate())  # JAX has its own\n"
        "from jaxllm.config import LoggingConfig\n"
        "w = m.MetricsWriter(pathlib.Path(sys.argv[1]), LoggingConfig(),"
        " run_name='r', resume_step=0)\n"
        "w.write(0, {'loss': 1}); w.close()\n"
        "assert set(threading.enumerate()) <= before, threading.enumerate()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "run")]
    subprocess.run(command, check=True, env=environment)


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_wandb_gets_the_same_scalars_and_a_resume_goes_on_in_the_same_run(
    tmp_path, monkeypatch
):
    runs = []
    fake = types.ModuleType("wandb")
    fake.__dict__["init"] = lambda **kw: runs.append(FakeRun(**kw)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first in (0, 2):
        config = LoggingConfig(tensorboard=False, wandb_project="p")
        with writer(tmp_path, first, config) as out:
            out.write(first, {"loss": 1})
        assert runs[-1].finished
        assert runs[-1].logged == [{"step": first, "loss": 1.0}]
    assert runs[0].settings == runs[1].settings
    assert runs[0].settings["project"] == "p" and runs[0].settings["name"] == "run"


def test_wandb_that_is_not_installed_is_refused_before_anything_is_touched(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(InputError, match=r"config\.logging\.wandb_project=p needs"):
        writer(tmp_path, 0, LoggingConfig(wandb_project="p"))
    assert read(tmp_path) == [{"step": 9}]


def test_device_memory_is_the_largest_peak_or_none(monkeypatch):
    assert device_memory_bytes() is None  # the CPU does not say
    devices = [
        types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 5}),
        types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 9}),
        types.SimpleNamespace(memory_stats=lambda: None),
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory_bytes() == 9


def test_a_write_takes_less_than_a_millisecond(tmp_path):
    names = "loss grad_norm lr tokens_per_s mfu step_s data_wait_s"
    scalars = {name: 0.123456789 for name in names.split()}
    with writer(tmp_path, config=LoggingConfig()) as out:
        took_s = []
        for step in range(100):
            start_s = time.perf_counter()
            out.write(step, scalars)
            took_s.append(time.perf_counter() - start_s)
        assert statistics.median(took_s) < 1e-3
