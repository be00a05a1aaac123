# SPDX-License-Identifier: Apache-2.0
"""Scripts that need arguments say so when they are given none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# These do their whole work without an argument.
NEED_NONE = {
    *("bench_step.py", "fuzz_runs.py", "longest.py", "measure_bubble.py"),
    *("damages.py", "settings_table.py"),  # the first is a module of fuzz_runs.py
    *("quickstart.sh", "slurm/install.sh", "slurm/trouble.py"),
}
# An arm of bench_step.py, which imports torch before all else.
NEEDS_TORCH = {"bench_step_torch.py"}
FOUND = {
    str(path.relative_to(SCRIPTS))
    for pattern in ("*.py", "*.sh", "*.sbatch")
    for path in SCRIPTS.rglob(pattern)
}
BASH = sorted(name for name in FOUND - NEED_NONE if not name.endswith(".py"))
PYTHON = sorted(n for n in FOUND - NEED_NONE - NEEDS_TORCH if n.endswith(".py"))


def test_what_is_left_out_is_there():
    assert FOUND >= NEED_NONE | NEEDS_TORCH
    assert len(BASH) >= 5 and len(PYTHON) >= 5


@pytest.mark.parametrize("name", BASH)
def test_a_shell_script_without_arguments_shows_its_usage(name, tmp_path):
    kept = {n: v for n, v in os.environ.items() if not n.startswith("SLURM")}
    # A copy elsewhere: whatever it does, it does not do it here.
    script = tmp_path / "scripts" / Path(name).name
    script.parent.mkdir()
    shutil.copy(SCRIPTS / name, script)
    ended = subprocess.run(
        ["bash", str(script)], env=kept, capture_output=True, text=True, timeout=60
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2, said
    assert "unbound variable" not in said and "command not found" not in said
    assert Path(name).name in said  # how to call it
    assert list(tmp_path.rglob("*")) == [script.parent, script]


@pytest.mark.parametrize("name", PYTHON)
def test_a_python_script_without_arguments_is_one_message(name, run_python, tmp_path):
    ended = run_python([str(SCRIPTS / name)], tmp_path)
    assert ended.status == 2, ended
    assert "Traceback" not in ended.stderr and ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_is_none_is_refused(tmp_path):
    (tmp_path / "sweep.txt").write_text("--config.seed=1\n\n")
    for task, why in (
        ("", "needs an array"),
        ("2", "no flags in line 2"),
        ("3", "line 3"),
    ):
        env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SWEEP": "sweep.txt"}
        ended = subprocess.run(
            ["bash", str(SCRIPTS / "slurm" / "train.sbatch"), "--workdir=run"],
            env=env | ({"SLURM_ARRAY_TASK_ID": task} if task else {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2 and why in ended.stderr
        assert "error: SWEEP=sweep.txt " in ended.stderr
