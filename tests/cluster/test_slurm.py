# SPDX-License-Identifier: Apache-2.0
"""Jobs of scripts/slurm/train.sbatch on a real SLURM, where this machine can have one.

What the script decides is tested with a stand-in for the training, which is quick; one
job trains. scripts/slurm/trouble.py disturbs such jobs in every way that it knows.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
LIMIT_S = 120
STAND_IN = """\
#!/bin/bash
life=${SLURM_RESTART_COUNT:-0}
shift 3  # -u -m jaxllm.train
echo "$*" >> "$0.$SLURM_JOB_NAME.$SLURM_ARRAY_TASK_ID$life"
case $SLURM_JOB_NAME in
  goes_on) mkdir -p runs/goes_on/checkpoints/$((life + 5)); exit $((life ? 0 : 75)) ;;
  waits) trap 'exit 75' TERM; for i in {1..600}; do sleep 0.1; done ;;
  killed) [ $life = 1 ] || kill -9 $$ ;;
  wrong) exit 2 ;;
  stuck) exit 75 ;;
esac
"""
SHOW = """\
import os
from jaxllm.cluster.devices import local_devices
from jaxllm.cluster.launch import find_launch
launch = find_launch(os.environ)
print(launch.process_id, launch.host, local_devices(os.environ))
"""


MEET = """\
import os, time
from jaxllm.cluster import launch
from jaxllm.cluster.door import Door
from jaxllm.cluster.knock import knock

launch._ports = lambda job: tuple(range(61990, 61994))  # they all want the same
mine = launch.find_launch(os.environ)
job, step = (int(os.environ[f"SLURM_{name}_ID"]) for name in ("JOB", "STEP"))
number = 100 * job + step
if mine.process_id == 0:
    door = Door(mine)
    peers = door.gather(60)
    peers.send({"service": number})
    door.guard()
    print(number, "lead", len(peers.connected), flush=True)
    time.sleep(4)  # it trains while others meet
else:
    peers, address = knock(mine, 60)
    print(number, address.rpartition(":")[2], flush=True)
    list(peers.receive(4))
"""
TWO_STEPS = """\
#!/bin/bash
for step in 1 2; do
  srun --ntasks=3 --overlap "$PYTHON" -c "$MEET" &
done
wait
"""


def load(name: str) -> ModuleType:
    path = ROOT / "scripts" / "slurm" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


clusters = load("cluster")
trouble = load("trouble")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(clusters.missing()), reason=f"no SLURM cluster: {clusters.missing()}"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    os.environ.update(trouble.environment())
    with clusters.cluster(2, gpus=4) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """Submits jobs whose training is the stand-in; `name` says what it does."""
    stand_in = tmp_path / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(stand_in))

    def submit(name: str, *flags: str, options: tuple[str, ...] = ()) -> str:
        command = ["sbatch", "--parsable", f"--job-name={name}", *options, str(SCRIPT)]
        flags = (f"--workdir=runs/{name}", *flags)
        return cluster.run(*command, *flags, cwd=tmp_path).strip()

    return submit


def test_a_stopped_job_is_requeued_until_it_has_finished(cluster, submit, tmp_path):
    jobs = [submit("goes_on", "--overwrite"), submit("killed")]
    for job in jobs:
        cluster.release(job, LIMIT_S)
    for job in jobs:
        cluster.wait_for(job, "COMPLETED", LIMIT_S)
    first, second = (tmp_path / f"stand_in.goes_on.{life}" for life in (0, 1))
    assert first.read_text() == "--workdir=runs/goes_on --overwrite\n"
    assert second.read_text() == "--workdir=runs/goes_on\n"  # or it would lose its life
    said = (tmp_path / f"goes_on-{jobs[0]}.out").read_text()
    assert "exit 75: requeued; the next life goes on from step 5." in said
    assert not list(tmp_path.glob("*.fruitless"))


def test_jobs_that_would_fail_again_are_not_requeued(
    cluster, submit, tmp_path, monkeypatch
):
    monkeypatch.setenv("FRUITLESS", "2")
    wrong, stuck, waits = submit("wrong"), submit("stuck"), submit("waits")
    cluster.wait_for(wrong, "FAILED", LIMIT_S)
    assert cluster.job(wrong)["ExitCode"] == "2:0"
    cluster.wait_for(waits, "RUNNING", LIMIT_S)
    cluster.release(stuck, LIMIT_S)
    cluster.run("scancel", waits)
    cluster.wait_for(waits, "CANCELLED", LIMIT_S)
    cluster.wait_for(stuck, "FAILED", LIMIT_S)
    assert cluster.job(stuck)["ExitCode"] == "75:0"
    said = (tmp_path / f"stuck-{stuck}.out").read_text()
    assert "2 lives in a row saved nothing: not requeued" in said
    assert not list(tmp_path.glob("*.fruitless"))


def test_an_array_is_a_sweep_over_the_lines_of_a_file(
    cluster, submit, tmp_path, monkeypatch
):
    (tmp_path / "sweep.txt").write_text(
        "--config.seed=1 --config.optimizer.lr=1e-3\n--config.seed=2\n"
    )
    monkeypatch.setenv("SWEEP", "sweep.txt")
    job = submit("sweep", options=("--array=1-2",))
    for task in (1, 2):
        cluster.wait_for(f"{job}_{task}", "COMPLETED", LIMIT_S)
    base = "--workdir=runs/sweep"
    first, second = (tmp_path / f"stand_in.sweep.{task}0" for task in (1, 2))
    more = "--config.seed=1 --config.optimizer.lr=1e-3"
    assert first.read_text() == f"{base} {more} {base}/1\n"
    assert second.read_text() == f"{base} --config.seed=2 {base}/2\n"


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ("--ntasks-per-node=1 --gpus-per-node=4", ["[]", "[]"]),
        (
            "--ntasks-per-node=2 --gpus-per-node=4",
            ["[0, 1]", "[2, 3]", "[0, 1]", "[2, 3]"],
        ),
        ("--ntasks=4 --gpus-per-task=1", ["[]"] * 4),
    ],
)
def test_processes_take_their_part_of_the_gpus_of_a_node(cluster, options, devices):
    said = cluster.run("srun", "-N2", *options.split(), sys.executable, "-c", SHOW)
    expected = [f"{index} n1 {chosen}" for index, chosen in enumerate(devices)]
    assert sorted(said.splitlines()) == expected


def test_steps_and_jobs_that_want_the_same_ports_meet_only_their_own(
    cluster, tmp_path, monkeypatch
):
    (tmp_path / "steps.sh").write_text(TWO_STEPS)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("MEET", MEET)
    command = ["sbatch", "--parsable", "--ntasks=3", "--nodelist=n1", "--output=%j.out"]
    jobs = [
        cluster.run(*command, str(tmp_path / "steps.sh"), cwd=tmp_path).strip()
        for _ in range(2)
    ]
    for job in jobs:
        cluster.wait_for(job, "COMPLETED", LIMIT_S)
        said = sorted((tmp_path / f"{job}.out").read_text().splitlines())
        numbers = [100 * int(job) + step for step in (0, 1)]
        expected = [f"{n} {rest}" for n in numbers for rest in (n, n, "lead 2")]
        assert said == sorted(expected)


def test_a_process_that_cannot_use_its_gpus_is_refused(cluster, tmp_path):
    trouble.prepare(tmp_path, cluster, 10)
    program = [sys.executable, "-m", "jaxllm.train", f"--config={tmp_path}/config.py"]
    with pytest.raises(RuntimeError) as refused:
        cluster.run(
            *("env", "--unset=JAX_PLATFORMS", "srun", "--gpus-per-node=4"),
            *(*program, f"--workdir={tmp_path}/run"),
        )
    said = str(refused.value)
    assert (
        "expected 1 process x 4 GPUs, found 1 cpu, by process; JAX has no CUDA" in said
    )
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


SLOW_FIRST_LIFE = """
import os, time
from jaxllm.run.run import Run

next_batch = Run.next_batch

def next_batch_slowly(self, step, should_stop):
    time.sleep(0.3)  # or the job could be done before it is signalled
    return next_batch(self, step, should_stop)

if "SLURM_RESTART_COUNT" not in os.environ:
    Run.next_batch = next_batch_slowly
"""


def test_a_job_on_two_nodes_that_gets_sigterm_goes_on_and_finishes(cluster, tmp_path):
    trouble.prepare(tmp_path, cluster, 40)
    config = tmp_path / "config.py"
    config.write_text(SLOW_FIRST_LIFE + config.read_text())
    job = trouble.Job(cluster, tmp_path, "term").submit()
    job.reach(1)
    trouble.term(job)
    job.finish()
    said = job.output()
    assert "2 cpu in 2 processes" in said
    assert "exit 75: requeued" in said and "resuming from step" in said
    assert [r["step"] for r in job.records() if "loss" in r] == list(range(40))
    assert json.loads((job.workdir / "config.json").read_text())["steps"] == 40
