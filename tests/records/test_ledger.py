# SPDX-License-Identifier: Apache-2.0
"""The ledger: all of a run's time, each second once, whatever ends its lives."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.cluster.phases import Phases, process_age_s
from jaxllm.config import CheckpointConfig
from jaxllm.config.files import config_to_dict
from jaxllm.records.json_lines import read_jsonlines
from jaxllm.records.ledger import FILE, KINDS, Account, Ledger, read_ledger
from jaxllm.train import train


class Clock:
    """A clock that goes when told to."""

    def __init__(self):
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float):
        self.now_s += seconds


def live(
    folder: Path,
    clock: Clock,
    first_step: int,
    steps: int,
    *,
    cost_s: int,
    every: int,
    phases: Phases | None = None,
) -> tuple[Ledger, int]:
    """Lives as a run does; returns the ledger, left open, and the newest save."""
    phases = phases or Phases(age_s=3.0, clock=clock)
    clock.wait(2.0)
    ledger = Ledger(folder, phases, clock=clock)
    ledger.begin(first_step)
    with phases("compile"):
        clock.wait(7.0)
    phases.begin("other")
    saved = first_step
    for step in range(first_step, first_step + steps):
        if step > first_step and step % every == 0:
            with phases("save"):
                clock.wait(1.0)
            ledger.write()
            saved = step
        phases.step = step + 1
        with phases("data_wait"):
            clock.wait(1.0)
        with phases("step"):
            clock.wait(cost_s)
    return ledger, saved


def kill(ledger: Ledger, folder: Path):
    """Ends a life as kill -9 does: what closing its ledger writes is taken back."""
    written = (folder / FILE).read_bytes()
    with ledger:
        pass
    (folder / FILE).write_bytes(written)


lives = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 50)), max_size=6
)


@given(lives=lives, every=st.integers(1, 4))
def test_every_second_is_counted_once_and_steps_done_again_are_lost(lives, every):
    clock, saved, counted, idle_s, lost_s = Clock(), 0, {}, 0, 0
    began_s = clock() - 3.0
    with tempfile.TemporaryDirectory() as name:
        for steps, cost_s, gap_s in lives:
            first, gone = saved, {s: c for s, c in counted.items() if s >= saved}
            counted = {s: c for s, c in counted.items() if s < saved}
            lost_s += sum(gone.values())
            ledger, saved = live(
                Path(name), clock, first, steps, cost_s=cost_s, every=every
            )
            kill(ledger, Path(name))
            counted |= dict.fromkeys(range(first, first + steps), cost_s + 1)
            clock.wait(gap_s + 3)
            idle_s += gap_s
        gone = sum(c for s, c in counted.items() if s >= saved)
        lost_s, left_s = lost_s + gone, sum(counted.values()) - gone
        ledger, _ = live(Path(name), clock, saved, 0, cost_s=1, every=every)
        with ledger:
            clock.wait(0.5)
        account = read_ledger(Path(name))
    assert account.total_s == pytest.approx(clock() - began_s)
    found = account.seconds
    assert found["step"] + found["data_wait"] == pytest.approx(left_s)
    assert found["lost"] == pytest.approx(lost_s)
    assert found["idle"] == pytest.approx(idle_s)
    assert found["compile"] == pytest.approx(7.0 * account.lives)
    assert found["start"] == pytest.approx(5.0 * account.lives)
    assert account.lives == len(lives) + 1
    assert all(found[kind] >= 0 for kind in KINDS)


def test_going_back_within_a_life_loses_the_steps_since(tmp_path):
    clock = Clock()
    phases = Phases(age_s=3.0, clock=clock)
    ledger, saved = live(tmp_path, clock, 0, 6, cost_s=2, every=4, phases=phases)
    with ledger:
        assert saved == 4
        phases.step = saved
        ledger.write()
        account = read_ledger(tmp_path)
    assert account.seconds["lost"] == pytest.approx(2 * (2 + 1))
    assert account.seconds["step"] == pytest.approx(4 * 2)


def test_a_phase_within_another_interrupts_it():
    clock = Clock()
    phases, seen = Phases(clock=clock), []
    phases.listen(seen.append)
    clock.wait(1)
    with phases("eval"):
        clock.wait(2)
        with phases("data_wait"):
            clock.wait(4)
        clock.wait(8)
    clock.wait(16)
    assert seen == ["eval", "data_wait", "eval", "start"]
    spent = {name: s for name, s in phases.seconds().items() if s}
    assert spent == {"start": 17, "eval": 10, "data_wait": 4}


def test_lines_become_rarer_as_a_life_grows_older(tmp_path):
    clock = Clock()
    phases = Phases(clock=clock)
    with Ledger(tmp_path, phases, clock=clock) as ledger:
        ledger.begin(0)
        for _ in range(100_000):
            with phases("step"):
                clock.wait(1.0)
        num_lines = len((tmp_path / FILE).read_text().splitlines())
        assert 1000 < num_lines < 3000
        assert ledger.goodput() == pytest.approx(1.0)
        assert read_ledger(tmp_path).total_s == pytest.approx(100_000, abs=60)


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_a_line_that_a_kill_cut_is_passed_over(tmp_path, cut):
    clock = Clock()
    kill(live(tmp_path, clock, 0, 5, cost_s=1, every=2)[0], tmp_path)
    path = tmp_path / FILE
    os.truncate(path, path.stat().st_size - cut)
    clock.wait(3.0)
    ledger, _ = live(tmp_path, clock, 4, 1, cost_s=1, every=2)
    with ledger:
        account = read_ledger(tmp_path)
    assert account.lives == 2
    assert account.total_s == pytest.approx(clock() - 1e9 + 3.0)
    assert path.read_bytes().endswith(b"\n")


def test_a_clock_that_is_behind_makes_no_idle_time_below_0():
    account = Account()
    for life, now_s in enumerate((100.0, 50.0)):
        line = {"life": life, "step": 0, "time": now_s, "seconds": {"start": 5.0}}
        account.add(line)
    assert (account.total_s, account.seconds["idle"]) == (10.0, 0.0)


def test_a_process_knows_its_age():
    script = (
        "import time; time.sleep(0.3)\n"
        "from jaxllm.cluster.phases import process_age_s as age\n"
        "now = time.monotonic\n"
        "before = now(); first = age(); after = now(); time.sleep(0.2)\n"
        "least = now() - after; second = age(); most = now() - before\n"
        "print(first, least, second - first, most)"
    )
    began_s = time.monotonic()
    said = subprocess.check_output([sys.executable, "-c", script], text=True)
    first, least, gained, most = map(float, said.split())
    assert 0.3 <= first <= time.monotonic() - began_s
    assert least - 1e-3 <= gained <= most + 1e-3
    assert process_age_s() > 0


def wait_for(condition: Callable[[], bool], process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


def ledger_steps(workdir, life=0):
    lines = read_jsonlines(workdir / FILE)
    return [line["step"] for line in lines if line["life"] == life]


def test_killed_and_resumed_a_run_accounts_for_the_time_on_the_wall(
    tiny, tmp_path, start_training, run_command
):
    slow = {"steps": 200, "data.batch_size": 64, "checkpoint.every": 80}
    config = config_to_dict(tiny({**slow, "eval.every": 0}))
    (tmp_path / "run.py").write_text(
        "from jaxllm.config.files import config_from_dict\n"
        f"def get_config():\n    return config_from_dict({config!r})\n"
    )
    command = ["-m", "jaxllm.train", "--config=run.py", "--workdir=run"]
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    log = tmp_path / "said.txt"
    began_s = time.time()
    saved = Checkpoints(workdir / CHECKPOINTS, CheckpointConfig())
    first = start_training(command, tmp_path, log, {})
    wait_for(lambda: any(80 < step for step in ledger_steps(workdir)), first)
    wait_for(lambda: bool(saved.steps()), first)  # a slow disk may not have it yet
    first.kill()
    first.wait()
    killed_s = time.time()
    reached = max(ledger_steps(workdir))
    time.sleep(1.0)
    restarted_s = time.time()
    second = start_training(command, tmp_path, log, {})
    assert second.wait() == 0
    said = log.read_text()
    # Not to the end of the process: the interpreter takes its time to go.
    *_, last = read_jsonlines(workdir / FILE)
    took_s = last["time"] - began_s
    account = read_ledger(workdir)
    assert account.lives == 2
    assert took_s - 5.0 < account.total_s <= took_s + 0.05
    assert 1.0 <= account.seconds["idle"] < restarted_s - killed_s + 3.0
    # By the time of the signal another save may have come after the last line.
    resumed_at = ledger_steps(workdir, life=1)[0]
    assert (account.seconds["lost"] > 0) == (reached > resumed_at)
    for kind in ("start", "compile", "restore", "step", "save"):
        assert account.seconds[kind] > 0, kind
    assert f"ledger: {account.table()}" in said
    lines = map(json.loads, metrics.read_text().splitlines())
    goodput = [line["goodput"] for line in lines if "goodput" in line]
    assert goodput[-1] == pytest.approx(account.goodput, abs=0.2)
    said = run_command("ledger run", tmp_path).stdout
    assert said == f"run: {account.table()}\n"


def test_a_run_in_python_begins_its_life_with_the_call(tiny, tmp_path):
    began_s = time.time()
    records = list(train(tiny(), tmp_path))
    account = read_ledger(tmp_path)
    assert account.total_s == pytest.approx(time.time() - began_s, abs=1.0)
    assert all(0 < r["goodput"] < 1 for r in records if "loss" in r)
