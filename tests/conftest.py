# SPDX-License-Identifier: Apache-2.0
"""Every test runs on 8 simulated CPU devices, with JAX at its strictest."""

import dataclasses
import gc
import json
import os
import platform
import pprint
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before the first import of JAX. Subprocesses that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# One cache for all workers and runs, apart for each kind of machine, as XLA's CPU
# programs are.
_CACHE = Path(__file__).parents[1] / ".cache" / "xla" / platform.machine()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the time of tests is XLA's, for programs that run once and for milliseconds.
# What is asserted of their text, XLA settles before it makes code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from jaxllm import tokenize
from jaxllm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    override,
)
from jaxllm.train import train
from pallas_kernels import offline

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Collects garbage less often: a quarter of the time of tracing and lowering."""
    gc.freeze()  # what is imported stays to the end
    gc.set_threshold(100_000, 20, 20)


# One process compiled the seven programs of test_communication.py in 247 s.
OFFLINE_LIMIT_S = 1200


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key, the same for every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> str:
    """A token folder: the source of this repository as bytes, a tenth held out."""
    folder = str(tmp_path_factory.mktemp("tokens") / "tokens")
    source = Path(tokenize.__file__).parent / "models"
    flags = f"--output={folder} --holdout=0.1 --holdout_by=tail --workers=1"
    assert tokenize.main(["tokenize", f"--input={source}/*.py", *flags.split()]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny(tokens) -> Callable[..., Config]:
    """Makes the config of a run of seconds, with overrides such as {"steps": 3}."""
    config = Config(
        steps=6,
        model=ModelConfig(
            vocab_size=264,
            num_layers=2,
            d_model=16,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            d_ff=32,
            dtype="float32",
        ),
        data=DataConfig(paths=(tokens,), sequence_length=16, batch_size=8),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=2, batches=2),
        checkpoint=CheckpointConfig(every=2),
        logging=LoggingConfig(every=1),
    )

    def make(overrides: Mapping[str, Any] = {}) -> Config:
        return override(config, overrides)

    return make


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """The directory of a finished run of `tiny()`; copy it to change it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    for _ in train(tiny({"checkpoint.keep_best": True}), workdir):
        pass
    return workdir


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended, and what it said."""

    status: int
    stdout: str
    stderr: str


class Forked:
    """A process that a command server runs, with what `subprocess.Popen` has."""

    def __init__(self, pid: int, ended: Path):
        self.pid, self._ended = pid, ended

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs."""
        return int(self._ended.read_text()) if self._ended.exists() else None

    def wait(self, timeout: float = 300) -> int:
        """Waits until the process has ended; returns its exit status."""
        until_s = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until_s:
                raise TimeoutError(f"process {self.pid} runs for more than {timeout} s")
            time.sleep(0.002)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the process at once."""
        self.send_signal(signal.SIGKILL)


class CommandServer:
    """Starts Python in forks of a process that has imported JAX already."""

    def __init__(self, folder: Path, env: Mapping[str, str]):
        self._folder, self._number = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("command_server.py"))],
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "CommandServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # no more requests: it waits for its forks

    def start(
        self,
        python: Sequence[str],
        folder: Path,
        stdout: Path,
        stderr: Path,
        env: Mapping[str, str],
        limit_s: int = 0,
    ) -> Forked:
        """Starts `python` with these arguments, such as ["-m", "jaxllm.train"]."""
        self._number += 1
        ended = self._folder / str(self._number)
        for path in (stdout, stderr):
            path.write_text("")
        request = {
            "python": list(python),
            "folder": str(folder),
            "env": dict(env),
            "stdout": str(stdout),
            "stderr": str(stderr),
            "ended": str(ended),
            "limit_s": limit_s,
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Forked(int(self._server.stdout.readline()), ended)

    def run(
        self,
        python: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        limit_s: int = 300,
    ) -> Ended:
        """Runs `python` with these arguments to its end."""
        stdout, stderr = (self._folder / f"{self._number}-{n}" for n in ("out", "err"))
        forked = self.start(python, folder, stdout, stderr, env, limit_s)
        status = forked.wait(limit_s)
        return Ended(status, stdout.read_text(), stderr.read_text())


@pytest.fixture(scope="session")
def command_server(tmp_path_factory) -> Iterator[CommandServer]:
    """Starts Python on one device, with JAX imported."""
    env = {"JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "120"}
    with CommandServer(tmp_path_factory.mktemp("said"), env) as server:
        yield server


@pytest.fixture(scope="session")
def run_python(command_server) -> Callable[..., Ended]:
    """Runs `python` with arguments such as ["-m", "jaxllm.train"], forked."""
    return lambda python, folder, **env: command_server.run(python, folder, env)


@pytest.fixture(scope="session")
def run_command(command_server) -> Callable[..., Ended]:
    """Runs "train --config x.py" as `python -m jaxllm.train --config x.py`, forked."""

    def run(command: str | list[str], folder: Path, **env: str) -> Ended:
        program, *arguments = command.split() if isinstance(command, str) else command
        return command_server.run(["-m", f"jaxllm.{program}", *arguments], folder, env)

    return run


@pytest.fixture(scope="session")
def run_offline(tmp_path_factory) -> Iterator[Callable[..., Any]]:
    """Does what `pallas_kernels.offline.run_python` does, forked.

    Each fork loads the CUDA plugin anew: a wrong instruction ends it alone.
    """
    folder = offline.toolchain()
    if folder is None:
        pytest.skip("run `make .venv/cuda`: there are no CUDA packages to compile with")
    said = tmp_path_factory.mktemp("offline")
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
    }
    with CommandServer(said, env) as server:

        def run(arguments: Sequence[str], **variables: str):
            ended = server.run(arguments, said, variables, OFFLINE_LIMIT_S)
            return subprocess.CompletedProcess(
                list(arguments), ended.status, ended.stdout, ended.stderr
            )

        yield run


@dataclasses.dataclass
class Processes:
    """Some processes of one run, on this machine."""

    processes: list[Forked]
    logs: list[Path]

    def wait(self) -> list[int]:
        """Waits until all have ended; returns their exit statuses."""
        return [process.wait() for process in self.processes]

    def said(self, index: int) -> str:
        """Returns what one of them has said so far."""
        return self.logs[index].read_text()


@pytest.fixture
def start_training(command_server) -> Iterator[Callable[..., Forked]]:
    """Starts Python with flags of a training, one of some processes or alone."""
    started: list[Forked] = []

    def start(
        python: Sequence[str], folder: Path, log: Path, env: Mapping[str, str]
    ) -> Forked:
        started.append(command_server.start(python, folder, log, log, env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def start_processes(start_training) -> Callable[..., Processes]:
    """Starts the training of a config in folder/run, by some processes."""

    def start(
        config: Config,
        folder: Path,
        number: int,
        devices: int,
        run: str,
        *,
        preamble: str = "",  # Python, before the config
        python: Sequence[str] = ("-m", "jaxllm.train"),
        env: Mapping[str, str] = {},
        more_flags: Mapping[int, Sequence[str]] = {},  # by process
    ) -> Processes:
        path = folder / "config.py"
        path.write_text(
            f"{preamble}\nfrom jaxllm.config import *\n"
            f"def get_config():\n    return {pprint.pformat(config)}\n"
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [f"--config={path}", f"--workdir={folder / run}"]
        logs = [folder / f"{run}-{number}-{index}.log" for index in range(number)]
        processes = [
            start_training(
                [*python, *flags, *more_flags.get(index, ())],
                folder,
                log,
                {
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAXLLM_COORDINATOR": f"127.0.0.1:{port}",
                    "JAXLLM_NUM_PROCESSES": str(number),
                    "JAXLLM_PROCESS_ID": str(index),
                    **env,
                },
            )
            for index, log in enumerate(logs)
        ]
        return Processes(processes, logs)

    return start
