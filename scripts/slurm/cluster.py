# SPDX-License-Identifier: Apache-2.0
"""Starts a real SLURM cluster on this machine, runs a command in it, and ends it.

python scripts/slurm/cluster.py [--nodes 2] [--gpus 0] bash

Needs root and SLURM itself, on Debian or Ubuntu from scripts/slurm/install.sh. Nodes
n1, n2, ... are processes here, and GPUs are names of /dev/null: SLURM hands them out as
it does real ones. Nothing outside a temporary folder changes.
"""

import argparse
import contextlib
import dataclasses
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
START_S = 30
CREDENTIAL_S = 3  # SLURM revokes a requeued job's credential for about so long
POLL_S = 0.2
SBIN = "/usr/sbin:/sbin"  # not in every PATH

CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=20
InactiveLimit=0
JobRequeue=1
PropagateResourceLimits=NONE
GresTypes=gpu
{nodes}
PartitionName=local Nodes={names} Default=YES MaxTime=INFINITE OverSubscribe=YES
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 "
    "RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
)


def missing() -> str:
    """Returns why this machine cannot have a cluster, or nothing."""
    path = f"{os.environ['PATH']}:{SBIN}"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if absent:
        return f"{', '.join(absent)} not found; see scripts/slurm/install.sh"
    if os.geteuid():
        return "only root can start SLURM's daemons"
    if subprocess.run(
        ["unshare", "--mount", "true"], stderr=subprocess.DEVNULL
    ).returncode:
        return "this root may not make a mount namespace"
    if not os.path.ismount("/sys/fs/cgroup"):
        return "slurmd needs a file system of control groups at /sys/fs/cgroup"
    return ""


@dataclasses.dataclass
class Cluster:
    """A running cluster.

    Attributes:
      folder: its configuration, state and logs.
      daemons: its processes by name: "munged", "slurmctld" and each node's.
    """

    folder: Path
    names: list[str]
    daemons: dict[str, subprocess.Popen] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of commands that talk to it."""
        path = f"{os.environ['PATH']}:{SBIN}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        return {**kept, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, **options) -> str:
        """Returns what a command prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, **options
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Returns what SLURM knows about a job, such as its JobState."""
        said = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(part.split("=", 1) for part in said.split() if "=" in part)

    def wait_for(self, number: str, state: str, timeout_s: float):
        """Waits until a job is in a state; it fails if the job ends in another one."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} - {state}
        end_s = time.monotonic() + timeout_s
        while (now := self.job(number)["JobState"]) != state:
            if now in ends or time.monotonic() > end_s:
                raise RuntimeError(f"job {number} is {now}, and not {state}")
            time.sleep(POLL_S)

    def release(self, number: str, timeout_s: float):
        """Waits until a job is requeued, and spares it SLURM's pause of two minutes."""
        self.wait_for(number, "PENDING", timeout_s)
        time.sleep(CREDENTIAL_S)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def start_node(self, name: str):
        """Starts the daemon of a node."""
        # A mount namespace: node names are known to the jobs on it and to nobody else.
        script = 'mount --bind "$0" /etc/hosts; exec slurmd -D -N "$1"'
        shell = ["bash", "-ec", script, str(self.folder / "hosts"), name]
        self.start(name, ["unshare", "--mount", "--propagation=private", *shell])

    def kill_node(self, name: str):
        """Kills every process on a node, as when its machine dies."""
        daemon = self.daemons[name]
        space = os.readlink(f"/proc/{daemon.pid}/ns/mnt")
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone, or not ours
                if os.readlink(path / "ns" / "mnt") == space:
                    os.kill(int(path.name), signal.SIGKILL)
        daemon.wait()

    def start(self, name: str, command: list[str]):
        """Starts a daemon in the foreground, with a log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log
            )

    def wait_until_idle(self):
        """Waits until every node is ready."""
        end_s = time.monotonic() + START_S
        while True:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
            if set(states) == {"idle"}:
                return
            if time.monotonic() > end_s:
                raise RuntimeError(f"the nodes are {states}; logs: {self.folder}")
            time.sleep(POLL_S)

    def stop(self):
        """Cancels every job, waits for their processes, and ends the daemons."""
        with contextlib.suppress(RuntimeError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root")
            self.run("scancel", "--user=root")
            end_s = time.monotonic() + START_S
            while self.run("squeue", "--noheader") and time.monotonic() < end_s:
                time.sleep(POLL_S)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextlib.contextmanager
def cluster(num_nodes: int = 2, *, gpus: int = 0) -> Iterator[Cluster]:
    """Starts a cluster; ends it, with its jobs, when it is left.

    Raises:
      RuntimeError: it did not start; or see `missing`.
    """
    if reason := missing():
        raise RuntimeError(reason)
    # Short: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:
        made = Cluster(Path(name), [f"n{i + 1}" for i in range(num_nodes)])
        _configure(made, gpus)
        try:
            _start_munge(made)
            made.start("slurmctld", ["slurmctld", "-D"])
            for node in made.names:
                made.start_node(node)
            _wait_for_controller(made)
            made.wait_until_idle()
            yield made
        finally:
            made.stop()


def _configure(made: Cluster, gpus: int):
    for name in ("munge", "state", "spool"):
        (made.folder / name).mkdir(mode=0o700)
    host, ports = (
        socket.gethostname().partition(".")[0],
        _free_ports(len(made.names) + 1),
    )
    nodes = [
        NODE.format(name=name, host=host, port=port, gpus=gpus)
        for name, port in zip(made.names, ports[1:], strict=True)
    ]
    text = CONFIG.format(
        host=host,
        port=ports[0],
        folder=made.folder,
        nodes="\n".join(nodes),
        names=",".join(made.names),
    )
    (made.folder / "slurm.conf").write_text(text)
    hosts = Path("/etc/hosts").read_text()
    ours = "".join(f"127.0.0.1 {name}\n" for name in made.names)
    (made.folder / "hosts").write_text(f"{hosts.rstrip()}\n{ours}")
    if gpus:
        for index in range(gpus):
            device = made.folder / f"gpu{index}"
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
        (made.folder / "gres.conf").write_text(
            f"Name=gpu File={made.folder}/gpu[0-{gpus - 1}]\n"
        )


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start_munge(made: Cluster):
    folder = made.folder / "munge"
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o400)
    places = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
    places |= {"log-file": "log", "seed-file": "seed"}
    options = [f"--{name}={folder / file}" for name, file in places.items()]
    made.start("munged", ["munged", "--foreground", "--force", *options])
    end_s = time.monotonic() + START_S
    while not (folder / "socket").exists() and time.monotonic() < end_s:
        time.sleep(POLL_S)


def _wait_for_controller(made: Cluster):
    end_s = time.monotonic() + START_S
    while True:
        try:
            made.run("scontrol", "ping")
            return
        except RuntimeError:
            if time.monotonic() > end_s:
                raise
            time.sleep(POLL_S)


def main() -> int:
    """Runs a command in a cluster; returns its status."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    values = parser.parse_args()
    if not values.command:
        parser.error("the command to run in it is missing, such as bash")
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with cluster(values.nodes, gpus=values.gpus) as made:
        return subprocess.run(values.command, env=made.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
