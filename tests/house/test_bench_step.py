# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole steps: a tiny one, and how its readings become a table."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import offline

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_step.py"


@pytest.fixture(scope="module")
def bench_step():
    spec = importlib.util.spec_from_file_location("bench_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_step"]


def run_one_arm(output: Path, *options: str) -> dict:
    """Runs the script as a user does; returns what it found."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *options, f"--output={output}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (arm,) = json.loads((output / "step.json").read_text())["arms"]
    return arm


@pytest.mark.slow
def test_a_tiny_run_writes_a_table_of_its_arms(tmp_path):
    arm = run_one_arm(tmp_path, "--tiny", "--batch=2", "--arms=xla")
    assert arm["tokens_per_s"] > 0 and arm["predicted_bytes"] > 0
    assert arm["losses"][1] < arm["losses"][0]
    text = (tmp_path / "step.md").read_text()
    assert "| xla |" in text
    assert re.search(r"^mlp +backward +\d", text, re.M)


@pytest.mark.slow
@pytest.mark.skipif(offline.toolchain() is None, reason="needs `make .venv/cuda`")
def test_memory_is_predicted_without_a_gpu(tmp_path):
    arm = run_one_arm(tmp_path, "--tiny", "--predict", "--arms=xla")
    assert arm["device"] == "NVIDIA H200" and arm["predicted_bytes"] > 0


def row(arm: str, *step_s: float, **more):
    facts = dict(tokens_a_step=100, flops_a_step=1e12, peak_flops=1e14)
    return {"arm": arm, "step_s": list(step_s), "losses": [2.0, 1.0], **facts, **more}


def test_readings_of_both_rounds_make_one_row(bench_step):
    found = [row("a", 1.0, 2.0), row("b", 5.0), row("b", 5.0), row("a", 3.0)]
    a, b = bench_step.summarize(found)
    assert (a["arm"], a["rounds"], a["median_step_s"]) == ("a", 2, 2.0)
    assert a["tokens_per_s"] == 50 and a["mfu"] == pytest.approx(0.005)
    assert a["spread"] == 1.0 and b["spread"] == 0.0


def test_an_arm_that_failed_is_a_row_with_its_reason(bench_step):
    rows = bench_step.summarize([{"arm": "a", "failed": "no memory"}, row("b", 1.0)])
    first, second = bench_step.format_rows(rows).splitlines()[2:]
    assert first.startswith("| a | no memory |")
    assert second.startswith("| b | 100 | 1.0 % | 1000.0 |")
    assert first.count("|") == second.count("|")


def test_the_reason_is_the_error_and_not_what_was_said_after_it(bench_step):
    log = "Traceback\nNotImplementedError: no segments\n\nFor simplicity, JAX has ..."
    assert bench_step._reason(log) == "NotImplementedError: no segments"
    assert bench_step._reason("") == "silent"


def test_every_arm_of_ours_names_a_choice_for_every_kernel(bench_step):
    for name, kernels in bench_step.ARMS.items():
        assert name == "torch" or set(bench_step.KERNELS) <= set(kernels)


def test_an_unknown_arm_is_refused(bench_step, capsys):
    with pytest.raises(SystemExit):
        bench_step.main(["--arms=mosaik"])
    assert "mosaik" in capsys.readouterr().err


def test_what_was_measured_stands_when_it_cannot_be_profiled(
    bench_step, tmp_path, monkeypatch
):
    (tmp_path / "arm.py").write_text(
        'print("{\\"step_s\\": [1.0]}"); raise OSError("x")'
    )
    monkeypatch.setattr(bench_step, "SCRIPTS", tmp_path)
    (tmp_path / "arm.py").rename(tmp_path / "bench_step_jax.py")
    asked = argparse.Namespace(tiny=True, predict=False, batch=2, output=tmp_path)
    asked.stem = "step"
    found = bench_step._run_arm("xla", asked, tmp_path, 60.0, profile=True)
    assert found["step_s"] == [1.0] and "failed" not in found
    assert "not profiled: status 1: OSError: x" in found["profile"]
