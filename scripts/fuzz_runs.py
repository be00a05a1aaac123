# SPDX-License-Identifier: Apache-2.0
"""Damages the files of a small run at random, and reads them as a resume does.

python scripts/fuzz_runs.py [--number 1000] [--seed 0] [--resumes 3]

Whatever is read must be what was written, or be refused with an InputError or a
CheckpointError; saves that nothing happened to must count. A finding is a line with the
seed that repeats it, and the exit status is 1 if there is any.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags
from damages import Damage, damage_one

import sharding
from jaxllm import flags, tokenize
from jaxllm.checkpoint import Checkpoints, find_steps, verify_step
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
)
from jaxllm.config.saved import FILE as CONFIG
from jaxllm.config.saved import read_config
from jaxllm.data.splits import open_held_out, open_train
from jaxllm.errors import CheckpointError, InputError
from jaxllm.records.ledger import read_ledger
from jaxllm.records.metrics import FILE as METRICS
from jaxllm.records.metrics import MetricsWriter
from jaxllm.run.saved_model import load_run_tokenizer
from jaxllm.run.workdir import TOKENIZER, claim
from jaxllm.step import prepare
from jaxllm.train import train

LIMIT_S = 30
STEPS: tuple[int, ...] = (2, 4, 6)
TOKENS = "tokens"
RUN = "run"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A finished run with its tokens, and what its files say."""

    home: Path  # of both folders
    config: Config
    abstract: Any
    states: dict[int, tuple[list[bytes], dict[str, Any]]]  # arrays and data, by step
    metrics: bytes
    tokens: list[int]


def make_subject(home: Path) -> Subject:
    """Tokenizes a text and trains on it for six steps."""
    text, tokens = home / "text.txt", home / TOKENS
    text.write_text("all work and no play\n" * 200)
    command = f"tokenize --input={text} --output={tokens} --holdout=0.2 --workers=1"
    with contextlib.redirect_stdout(None):
        assert tokenize.main([*command.split(), "--holdout_by=tail"]) == 0
    model = ModelConfig(
        vocab_size=264,
        num_layers=1,
        d_model=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        d_ff=8,
        dtype="float32",
    )
    config = Config(
        steps=STEPS[-1],
        model=model,
        data=DataConfig(paths=(str(tokens),), sequence_length=8, batch_size=8),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
        eval=EvalConfig(every=2, batches=1),
        checkpoint=CheckpointConfig(every=2, keep_latest=9, keep_best=True),
        logging=LoggingConfig(every=1, tensorboard=False),
    )
    workdir = home / RUN
    for _ in train(config, workdir):
        pass
    abstract = prepare(config, sharding.make_mesh(config.mesh.sizes)).abstract_state
    states = {}
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        for step in STEPS:
            states[step] = _bits(*checkpoints.restore(step, abstract))
    metrics = (workdir / METRICS).read_bytes()
    return Subject(home, config, abstract, states, metrics, _read_tokens(config))


def fuzz(subject: Subject, number: int, seed: int) -> Iterator[str]:
    """Yields a line for each finding among some numbers of damages."""
    pristine = Path(tempfile.mkdtemp(prefix="pristine")) / "home"
    shutil.copytree(subject.home, pristine)
    try:
        for index in range(number):
            _renew(pristine, subject.home)
            damage = _damage(subject, seed, index)
            try:
                with _limit(LIMIT_S):
                    faults = _read_all(subject, damage)
            except (Exception, TimeoutError) as error:
                faults = [f"{type(error).__name__}: {error}"]
            for fault in faults:
                yield f"seed {seed} case {index}: {damage.text}: {fault}"
    finally:
        _renew(pristine, subject.home)
        shutil.rmtree(pristine.parent)


def _damage(subject: Subject, seed: int, index: int) -> Damage:
    choice = random.Random(f"{seed} {index}")
    return damage_one(subject.home, (RUN, TOKENS), (4, 1), choice)


def _read_all(subject: Subject, damage: Damage) -> list[str]:
    """Returns what is wrong with what the readers return."""
    faults: list[str] = []
    workdir, config = subject.home / RUN, subject.config
    of_config = damage.touches(RUN, CONFIG)
    if damage.touches(TOKENS):
        with contextlib.suppress(InputError):
            if _read_tokens(config) != subject.tokens and _is_of_manifest(damage):
                faults.append("other tokens")
    if of_config:
        with contextlib.suppress(InputError):
            read_config(workdir)
    if damage.touches(RUN, TOKENIZER):
        with contextlib.suppress(InputError):
            if load_run_tokenizer(workdir, None).kind != "bytes":
                faults.append("another tokenizer")
    read_ledger(workdir)
    newest = _check_saves(subject, damage, faults)
    try:
        with claim(workdir, config, overwrite=False):
            read_ledger(workdir)
            _check_metrics(subject, damage, newest or 0, faults)
    except InputError as error:
        if not of_config and not damage.text.startswith("link "):
            faults.append(f"refused: {error}")
    return faults


def _check_saves(subject: Subject, damage: Damage, faults: list[str]) -> int | None:
    """Returns the step that a resume takes, if any."""
    folder = subject.home / RUN / CHECKPOINTS
    touched = [s for s in STEPS if damage.touches(RUN, CHECKPOINTS, str(s))]
    good = set(STEPS) - set(touched)
    if damage.paths[0] == Path(RUN, CHECKPOINTS):
        good = set()
    elif not damage.touches(RUN, CHECKPOINTS):
        return max(good)
    checkpoints = Checkpoints(folder, subject.config.checkpoint)
    try:
        found = checkpoints.steps()
        best = checkpoints.best()
        step, state, data = checkpoints.restore_newest(subject.abstract)
    except (CheckpointError, InputError) as error:
        if good:
            faults.append(f"good saves {good} are lost: {error}")
        return None
    if not good <= set(found) <= set(STEPS) or step < max(good, default=0):
        faults.append(f"resumes from {step} of the steps {found}, good are {good}")
    if best not in STEPS:
        faults.append(f"best is {best}")
    if _bits(state, data) != subject.states[step]:
        faults.append(f"step {step} is not what was saved")
    faults += _verify(folder, good, {*touched, step})
    return step


def _verify(folder: Path, good: set[int], looked_at: set[int]) -> Iterator[str]:
    for step in set(find_steps(folder)[0]) & looked_at:
        try:
            verify_step(folder / str(step))
        except CheckpointError as error:
            if step in good:
                yield f"good save {step} is called bad: {error}"


def _check_metrics(
    subject: Subject, damage: Damage, step: int, faults: list[str]
) -> None:
    workdir = subject.home / RUN
    logging_config = subject.config.logging
    with MetricsWriter(workdir, logging_config, run_name=RUN, resume_step=step):
        pass
    lines = subject.metrics.splitlines(keepends=True)
    kept = b"".join(line for line in lines if int(line.split(b" ")[1][:-1]) < step)
    if not damage.touches(RUN, METRICS) and step:
        if (workdir / METRICS).read_bytes() != kept:
            faults.append("metrics that nothing happened to are others")


def _is_of_manifest(damage: Damage) -> bool:
    """Returns whether it is noticed: token files are too large to be hashed at once."""
    return damage.paths[0].suffix == ".json"


def _read_tokens(config: Config) -> list[int]:
    train = open_train(config.data)
    splits = [*train, *open_held_out(config.data, train)]
    return np.concatenate([s.slice(0, s.num_tokens) for s in splits]).tolist()


def _bits(state: Any, data: dict[str, Any]) -> tuple[list[bytes], dict[str, Any]]:
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))], data


def _renew(pristine: Path, home: Path) -> None:
    """Makes the files anew, as hard links but for those that are appended to."""

    def copy(source: str, target: str) -> None:
        (shutil.copyfile if source.endswith("l") else os.link)(source, target)

    shutil.rmtree(home)
    shutil.copytree(pristine, home, copy_function=copy)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resume(subject: Subject, number: int, seed: int) -> Iterator[str]:
    """Yields a line for each process that resumes a damaged run and ends with a bug."""
    pristine = Path(tempfile.mkdtemp(prefix="pristine")) / "home"
    shutil.copytree(subject.home, pristine)
    for index in range(number):
        _renew(pristine, subject.home)
        damage = _damage(subject, seed, index)
        command = ["-m", "jaxllm.train", f"--workdir={subject.home / RUN}"]
        done = subprocess.run(
            [sys.executable, *command, f"--config.steps={STEPS[-1] + 2}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        bug = "Traceback" in done.stderr or done.returncode not in (0, 1, 2)
        if bug:
            yield (
                f"seed {seed} case {index}: {damage.text}: status {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
    shutil.rmtree(pristine.parent)


def main(argv: list[str]) -> int:
    del argv
    values, began_s, findings = absl_flags.FLAGS, time.monotonic(), 0
    logging.disable()  # of warnings that a resume would show
    sys.unraisablehook = lambda unraisable: None  # of event loops that Orbax closed
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(Path(folder))
        gc.freeze()  # after a failed read all other objects are looked through
        for finding in itertools.chain(
            fuzz(subject, values.number, values.seed),
            resume(subject, values.resumes, values.seed),
        ):
            print(finding, flush=True)
            findings += 1
    seconds = time.monotonic() - began_s
    print(
        f"{values.number} damages, {values.resumes} resumes, {findings} findings, "
        f"{seconds:.0f} s"
    )
    return flags.FAILED if findings else flags.FINISHED


if __name__ == "__main__":
    absl_flags.DEFINE_integer("number", 1000, "number of damages that are read")
    absl_flags.DEFINE_integer("seed", 0, "seed of the damages")
    absl_flags.DEFINE_integer("resumes", 3, "number of damaged runs that are resumed")
    flags.run(main)
