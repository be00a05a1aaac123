# SPDX-License-Identifier: Apache-2.0
"""Every test runs on 8 simulated CPU devices, with JAX at its strictest."""

import dataclasses
import json
import os
import platform
import pprint
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before the first import of JAX. Subprocesses that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# One cache for all workers and runs, apart for each kind of machine, as XLA's CPU
# programs are.
_CACHE = Path(__file__).parents[1] / ".cache" / "xla" / platform.machine()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

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

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
    """How a command ended, and what it said."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def command_server() -> Iterator[subprocess.Popen]:
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("command_server.py"))],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "120"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="session")
def run_command(command_server, tmp_path_factory) -> Callable[..., Ended]:
    """Runs "train --config x.py" as `python -m jaxllm.train --config x.py`, forked."""

    def run(command: str | list[str], folder: Path, **env: str) -> Ended:
        program, *arguments = command.split() if isinstance(command, str) else command
        said = tmp_path_factory.mktemp("said")
        request = {
            "module": f"jaxllm.{program}",
            "arguments": arguments,
            "folder": str(folder),
            "env": env,
            "stdout": str(said / "stdout"),
            "stderr": str(said / "stderr"),
        }
        print(json.dumps(request), file=command_server.stdin, flush=True)
        status = int(command_server.stdout.readline())
        return Ended(status, *((said / n).read_text() for n in ("stdout", "stderr")))

    return run


@dataclasses.dataclass
class Processes:
    """Some processes of one run, on this machine."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self) -> list[int]:
        """Waits until all have ended; returns their exit statuses."""
        return [process.wait(timeout=300) for process in self.processes]

    def said(self, index: int) -> str:
        """Returns what one of them has said so far."""
        return self.logs[index].read_text()


@pytest.fixture
def start_processes() -> Iterator[Callable[..., Processes]]:
    """Starts the training of a config in folder/run, by some processes."""
    started: list[subprocess.Popen] = []

    def start(
        config: Config,
        folder: Path,
        number: int,
        devices: int,
        run: str,
        *,
        preamble: str = "",  # Python, before the config
    ) -> Processes:
        path = folder / "config.py"
        path.write_text(
            f"{preamble}\nfrom jaxllm.config import *\n"
            f"def get_config():\n    return {pprint.pformat(config)}\n"
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [folder / f"{run}-{number}-{index}.log" for index in range(number)]
        for index, log in enumerate(logs):
            environment = {
                **os.environ,
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAXLLM_COORDINATOR": f"127.0.0.1:{port}",
                "JAXLLM_NUM_PROCESSES": str(number),
                "JAXLLM_PROCESS_ID": str(index),
            }
            command = [sys.executable, "-m", "jaxllm.train", f"--config={path}"]
            command.append(f"--workdir={folder / run}")
            with log.open("w") as file:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )
        return Processes(started[-number:], logs)

    yield start
    for process in started:
        process.kill()
        process.wait()
