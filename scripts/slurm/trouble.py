# SPDX-License-Identifier: Apache-2.0
"""Disturbs jobs of scripts/slurm/train.sbatch on a real SLURM cluster of this machine.

python scripts/slurm/trouble.py [--steps 700] [requeue term slurmd kill limit cancel]

Each job trains one small model in two processes on two nodes. It must end as it should,
and with bitwise the losses of the job that nobody disturbed. Needs what
scripts/slurm/cluster.py needs. Exit status: 0 all is well, 1 it is not.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import Cluster, cluster

ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # for any one life of a job
POLL_S = 0.1
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
DEAD = "n2"  # the node that dies
SHOWN = 2000  # characters of what a job said before it failed
OF_THE_RUN = ("loss", "grad_norm", "eval_loss")  # equal in an undisturbed one
ROW = "{:<8} {:<10} {:>6}  {:<14} {}".format
CONFIG = """\
from jaxllm.config import *

def get_config():
    return Config(
        steps={steps},
        model=ModelConfig(
            vocab_size=264, num_layers=2, d_model=32, num_heads=2, num_kv_heads=2,
            head_dim=16, d_ff=64, dtype="float32",
        ),
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(paths=({tokens!r},), sequence_length=64, batch_size=8),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=10),
        eval=EvalConfig(every={every}, batches=1),
        checkpoint=CheckpointConfig(every={every}),
        logging=LoggingConfig(every=1, tensorboard=False),
    )
"""


@dataclasses.dataclass
class Job:
    """A job of train.sbatch, and what can be seen of it."""

    cluster: Cluster
    folder: Path
    name: str
    options: tuple[str, ...] = ()  # of sbatch
    flags: tuple[str, ...] = ()  # of the training
    number: str = ""

    @property
    def workdir(self) -> Path:
        return self.folder / self.name

    def submit(self) -> "Job":
        """Gives the job to SLURM."""
        said = self.cluster.run(
            *("sbatch", "--parsable", f"--job-name={self.name}", "--nodes=2"),
            *(*self.options, str(ROOT / "scripts" / "slurm" / "train.sbatch")),
            *(f"--config={self.folder}/config.py", f"--workdir={self.workdir}"),
            *self.flags,
            cwd=self.folder,
        )
        self.number = said.strip()
        return self

    def output(self) -> str:
        """Returns what all lives of the job have said."""
        path = self.folder / f"{self.name}-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def records(self) -> list[dict[str, Any]]:
        """Returns the whole lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reach(self, step: int):
        """Waits until a step is logged."""
        end_s = time.monotonic() + LIMIT_S
        while not any(record["step"] >= step for record in self.records()):
            state = self.cluster.job(self.number)["JobState"]
            if state in ENDED or time.monotonic() > end_s:
                raise self.failed(state)
            time.sleep(POLL_S)

    def failed(self, what: str) -> RuntimeError:
        return RuntimeError(f"it is {what}:\n{self.output()[-SHOWN:]}")

    def finish(self):
        """Waits until the job has ended well, through any number of lives."""
        end_s = time.monotonic() + LIMIT_S
        while (now := self.cluster.job(self.number))["JobState"] != "COMPLETED":
            if now["JobState"] in ENDED:
                raise self.failed(now["JobState"])
            if time.monotonic() > end_s:
                raise self.failed("not at its end")
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                self.cluster.release(self.number, LIMIT_S)
            time.sleep(POLL_S)


def requeue(job: Job):
    """Puts the job back into the queue."""
    job.cluster.run("scontrol", "requeue", job.number)


def term(job: Job):
    """Sends SIGTERM to the processes."""
    job.cluster.run("scancel", "--signal=TERM", job.number)


def usr1(job: Job):
    """Sends SIGUSR1 to the processes."""
    job.cluster.run("scancel", "--signal=USR1", job.number)


def slurmd(job: Job):
    """Kills everything on the second node, as a dead machine; a third one is there."""
    job.cluster.kill_node(DEAD)


def kill(job: Job):
    """Kills one of the two processes."""
    os.kill(processes_of(job)[-1], signal.SIGKILL)


def limit(job: Job):
    """Lets the time limit of two minutes come near."""
    del job


def cancel(job: Job):
    """Cancels the job: it saves, and is not requeued."""
    job.cluster.run("scancel", job.number)


TROUBLES: dict[str, Callable[[Job], None]] = {
    each.__name__: each for each in (requeue, term, usr1, slurmd, kill, limit, cancel)
}
OPTIONS = {"limit": ("--time=2", "--signal=TERM@10")}


def processes_of(job: Job) -> list[int]:
    """Returns the process ids of the training, in the order that they were started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"-m" in words and f"--workdir={job.workdir}".encode() in words:
                if words[0].endswith(b"python") or b"python" in words[0]:
                    found.append(int(path.name))
    return sorted(found)


def losses(job: Job) -> list[dict[str, float]]:
    """Returns the numbers that no disturbance may change, by step."""
    return [
        {name: record[name] for name in ("step", *OF_THE_RUN) if name in record}
        for record in job.records()
    ]


def row(job: Job, state: str, began_at_s: float) -> str:
    """Returns a row of the table."""
    said = job.output()
    resumed = re.findall(r"resuming from step (\d+)", said)
    ends = re.findall(r"^exit (\d+)", said, re.M)
    took = f"{time.monotonic() - began_at_s:.0f} s"
    return ROW(job.name, state, took, ", ".join(resumed), ", ".join(ends))


def disturb(job: Job, calm: Job, step: int) -> str:
    """Disturbs a job at a step and waits for its end; returns what is wrong with it."""
    began_at_s = time.monotonic()
    trouble = TROUBLES[job.name]
    job.submit()
    if trouble is not limit:
        job.reach(step)
    trouble(job)
    if trouble is cancel:
        job.cluster.wait_for(job.number, "CANCELLED", LIMIT_S)
    else:
        job.finish()
    print(row(job, job.cluster.job(job.number)["JobState"], began_at_s), flush=True)
    if trouble is slurmd:
        job.cluster.start_node(DEAD)
    if trouble is cancel:
        return ""
    if "resuming from" not in job.output():
        return "it was never resumed; give more --steps"
    return "" if losses(job) == losses(calm) else "other losses than the calm job"


def prepare(folder: Path, cluster: Cluster, steps: int):
    """Writes the tokens and the config."""
    source = f"--input={ROOT}/sharding/*.py"
    tokens = folder / "tokens"
    cluster.run(
        sys.executable,
        "-m",
        "jaxllm.tokenize",
        source,
        f"--output={tokens}",
        "--holdout=0.1",
    )
    text = CONFIG.format(steps=steps, tokens=str(tokens), every=max(1, steps // 10))
    (folder / "config.py").write_text(text)


def environment() -> dict[str, str]:
    """The environment of the jobs."""
    return {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }


def main() -> int:
    """Runs the jobs one after the other; prints a table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--keep", help="folder for the runs and what the jobs say")
    parser.add_argument("troubles", nargs="*", choices=[[], *TROUBLES])
    values = parser.parse_args()
    os.environ.update(environment())
    with contextlib.ExitStack() as stack:
        folder = values.keep or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        made = stack.enter_context(cluster(3))
        prepare(folder, made, values.steps)
        print(ROW("job", "state", "took", "resumed at", "lives before end with"))
        calm, began_at_s, faults = Job(made, folder, "calm"), time.monotonic(), []
        calm.submit().finish()
        print(row(calm, "COMPLETED", began_at_s), flush=True)
        for name in values.troubles or TROUBLES:
            job = Job(made, folder, name, OPTIONS.get(name, ()))
            try:
                fault = disturb(job, calm, values.steps // 4)
            except RuntimeError as error:
                fault = str(error)
            faults += [f"{name}: {fault}"] * bool(fault)
    print("\n".join(faults) or "bitwise the losses of the calm job.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
