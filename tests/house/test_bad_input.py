# SPDX-License-Identifier: Apache-2.0
"""Wrong input to every entry point: a status, one message that helps, nothing lost."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Not imported from `jaxllm.errors`: the numbers are the contract with schedulers.
FAILED, WRONG_INPUT = 1, 2
CONFIG = """\
from jaxllm.config import *
def get_config():
    return Config(
        steps=4,
        model=ModelConfig(
            vocab_size=264, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2,
            head_dim=8, d_ff=32, dtype="float32",
        ),
        data=DataConfig(paths=("data",), sequence_length=16, batch_size=8),
        optimizer=OptimizerConfig(lr=1e-2),
        eval=EvalConfig(every=2, batches=1),
        checkpoint=CheckpointConfig(every=2),
        logging=LoggingConfig(every=1, tensorboard=False),
    )
"""

Prepare = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that is wrong, in a folder made by the fixture `base`."""

    command: str
    fragments: tuple[str, ...]  # of the message, all of them
    status: int = WRONG_INPUT
    prepare: Prepare | None = None  # changes the folder before
    devices: int = 1
    starts: bool = False  # it is found wrong once the run is under way


def write(name: str, content: bytes | str) -> Prepare:
    data = content.encode() if isinstance(content, str) else content

    def prepare(folder: Path):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return prepare


def remove(name: str) -> Prepare:
    return lambda folder: shutil.rmtree(folder / name)


def damage(pattern: str) -> Prepare:
    """Overwrites the second half of the files that match."""

    def prepare(folder: Path):
        paths = [path for path in folder.glob(pattern) if path.is_file()]
        assert paths
        for path in paths:
            size = path.stat().st_size // 2
            path.write_bytes(
                path.read_bytes()[:size] + random.Random(0).randbytes(size)
            )

    return prepare


def truncate(name: str) -> Prepare:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 2)


def overwrite(name: str) -> Prepare:
    return lambda folder: (folder / name).write_bytes(
        b"\xff" * (folder / name).stat().st_size
    )


NEW = "train --config run.py --workdir new"
RESUME = "train --config run.py --workdir run"
EVALUATE = "evaluate --workdir run"
GENERATE = "generate --workdir run"
LOW = np.zeros(4000, "<u2").tobytes()  # token 0, in nanoGPT's format

CASES = {
    # The command line
    "unknown flag": Case(
        "train --confg run.py", ("--confg is not a flag", "did you mean --config?")
    ),
    "positional argument": Case(
        "train run.py --workdir new",
        ("'run.py' is not a flag", "did you mean --config=run.py?"),
    ),
    "flag without a value": Case(
        "train --config run.py --workdir", ("Missing value", "workdir")
    ),
    "no config": Case("train", ("--config is missing", "give a file")),
    "no workdir": Case("train --config run.py", ("--workdir is missing", "give the")),
    "neither config nor a run": Case(
        "train --workdir new", ("--workdir=new holds no run", "--config to start one")
    ),
    # The config file
    "missing config file": Case(
        "train --config runn.py --workdir new",
        ("runn.py does not exist", "did you mean run.py?"),
    ),
    "config file is a folder": Case(
        "train --config data --workdir new", ("data is a directory", "ends in .py")
    ),
    "config file raises": Case(
        "train --config x.py --workdir new",
        ("x.py, line 2", "ZeroDivisionError"),
        prepare=write("x.py", "def get_config():\n    return 1 / 0\n"),
    ),
    "config file is no Python": Case(
        "train --config x.py --workdir new",
        ("x.py, line 2", "SyntaxError"),
        prepare=write("x.py", "def get_config():\n    return (\n"),
    ),
    "config file imports what is missing": Case(
        "train --config x.py --workdir new",
        ("x.py, line 1", "imports no_such_thing", "not installed"),
        prepare=write("x.py", "import no_such_thing\n"),
    ),
    "no get_config": Case(
        "train --config x.py --workdir new",
        ("x.py has no get_config()", "def get_config() -> Config"),
        prepare=write("x.py", "config = 1\n"),
    ),
    "get_config returns something else": Case(
        "train --config x.py --workdir new",
        ("x.py: get_config() returned dict", "it must return"),
        prepare=write("x.py", "def get_config():\n    return {}\n"),
    ),
    # Settings
    "unknown setting": Case(
        f"{NEW} --config.optimizer.lrr=1",
        ("config.optimizer.lrr", "did you mean config.optimizer.lr?"),
    ),
    "wrong type": Case(f"{NEW} --config.steps=many", ("config.steps='many'", "int")),
    "wrong choice": Case(
        f"{NEW} --config.optimizer.name=adamv",
        ("config.optimizer.name='adamv'", "one of adamw", "did you mean adamw?"),
    ),
    "no steps": Case(f"{NEW} --config.steps=0", ("config.steps=0", "from 1 to")),
    "negative rate": Case(
        f"{NEW} --config.optimizer.lr=-1", ("config.optimizer.lr=-1", "above 0")
    ),
    "rate is no number": Case(
        f"{NEW} --config.optimizer.lr=nan", ("config.optimizer.lr=nan", "above 0")
    ),
    "microbatches": Case(
        f"{NEW} --config.optimizer.microbatches=3",
        ("config.data.batch_size=8", "microbatches=3", "use 6 or 9"),
    ),
    "key heads": Case(
        f"{NEW} --config.model.num_heads=3",
        ("num_kv_heads=2 must divide config.model.num_heads=3", "use one of [1, 3]"),
    ),
    "odd heads": Case(
        f"{NEW} --config.model.head_dim=7",
        ("config.model.head_dim=7 must be even", "use 6 or 8"),
    ),
    "windows": Case(
        f"{NEW} --config.model.windows=0,8,8",
        ("config.model.num_layers=2", "windows=(0, 8, 8)", "use 3 layers"),
    ),
    "saves kept": Case(
        f"{NEW} --config.checkpoint.keep_every=3",
        ("config.checkpoint.keep_every=3", "every=2", "use 2 or 4"),
    ),
    # The mesh
    "impossible mesh": Case(
        f"{NEW} --config.mesh.fsdp=3", ("config.mesh", "'fsdp': 3", "1 device", "-1")
    ),
    "mesh with two rests": Case(
        f"{NEW} --config.mesh.data=-1",
        ("config.mesh=", "-1 on one axis only", "give the others"),
    ),
    "mesh of no device": Case(
        f"{NEW} --config.mesh.tensor=0", ("config.mesh.tensor=0", "above 0, or -1")
    ),
    "indivisible batch": Case(
        f"{NEW} --config.data.batch_size=12",
        ("config.data.batch_size", "=12", "use B=8 or 16"),
        devices=8,
    ),
    "heads over tensor": Case(
        f"{NEW} --config.mesh.tensor=8",
        ("config.model.num_heads=2", "tensor=8", "use N=8"),
        devices=8,
    ),
    "vocabulary over tensor": Case(
        f"{NEW} --config.mesh.tensor=2 --config.model.vocab_size=265",
        ("config.model.vocab_size=265", "tensor=2", "use V=264 or 266"),
        devices=8,
    ),
    # Kernels and loggers
    "cudnn without a GPU": Case(
        f"{NEW} --config.kernels.attention=cudnn --config.model.dtype=bfloat16",
        ("config.kernels.attention=cudnn", "cpu", "segments", "use xla"),
    ),
    "mosaic without a GPU": Case(
        f"{NEW} --config.kernels.norm=mosaic",
        ("config.kernels.norm=mosaic", "cpu", "use xla"),
    ),
    "the loss of float32": Case(
        f"{NEW} --config.kernels.cross_entropy=mosaic",
        ("config.kernels.cross_entropy=mosaic", "cpu", "float32", "use xla"),
    ),
    "cudnn has no norm": Case(
        f"{NEW} --config.kernels.norm=cudnn",
        ("config.kernels.norm='cudnn'", "auto, mosaic, xla"),
    ),
    "wandb is not installed": Case(
        f"{NEW} --config.logging.wandb_project=mine",
        ("config.logging.wandb_project=mine", "pip install 'jaxllm[wandb]'"),
        # Found before what is installed: the same on a machine that has it.
        prepare=write("wandb.py", "raise ImportError('No module named wandb')"),
    ),
    # Data
    "missing data": Case(
        f"{NEW} --config.data.paths=nowhere",
        ("nowhere does not exist", "python -m jaxllm.tokenize"),
    ),
    "text is not tokens": Case(
        f"{NEW} --config.data.paths=run.py",
        ("run.py is not a token file", "python -m jaxllm.tokenize"),
    ),
    "folder without tokens": Case(
        f"{NEW} --config.data.paths=empty",
        ("empty holds neither manifest.json nor .bin", "python -m jaxllm.tokenize"),
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    "empty corpus": Case(
        f"{NEW} --config.data.paths=x.bin",
        ("x.bin holds no tokens", "name a file"),
        prepare=write("x.bin", b""),
    ),
    "damaged manifest": Case(
        NEW,
        ("data/manifest.json is damaged", "not JSON", "copy the folder again"),
        prepare=write("data/manifest.json", '{"format": '),
    ),
    "manifest of another version": Case(
        NEW,
        ("data/manifest.json has format 'jaxllm tokens 9'", "make the folder again"),
        prepare=write("data/manifest.json", '{"format": "jaxllm tokens 9"}'),
    ),
    "truncated shard": Case(
        NEW,
        ("data/train-00000.bin has", "manifest.json says", "copy the folder again"),
        prepare=truncate("data/train-00000.bin"),
    ),
    "missing shard": Case(
        NEW,
        ("data/eval-00000.bin is missing", "copy the folder again"),
        prepare=lambda folder: (folder / "data/eval-00000.bin").unlink(),
    ),
    "odd bytes": Case(
        f"{NEW} --config.data.paths=x.bin",
        ("x.bin has 4001 bytes", "uint16", "damaged"),
        prepare=write("x.bin", b"\0" * 4001),
    ),
    "unfinished tokens": Case(
        f"{NEW} --config.data.paths=half",
        ("half is not finished", "run the same command again"),
        prepare=write("half/.jaxllm-partial/train-00000.bin", LOW),
    ),
    "vocabulary too small": Case(
        f"{NEW} --config.model.vocab_size=256",
        ("config.model.vocab_size=256", "257", "data", "use 257"),
    ),
    "token above the vocabulary": Case(
        f"{NEW} --config.data.paths=x.bin --config.data.eval_paths=data "
        "--config.data.end_of_document=0",
        ("x.bin", "token 9999", "config.model.vocab_size=264"),
        prepare=write("x.bin", LOW[:2000] + np.array([9999], "<u2").tobytes() * 99),
        starts=True,
    ),
    "too little text": Case(
        f"{NEW} --config.data.sequence_length=999999",
        ("config.data.sequence_length=999999", "tokens", "use at most"),
    ),
    "best fit without documents": Case(
        f"{NEW} --config.data.packing=best_fit --config.data.paths=x.bin "
        "--config.eval.every=0",
        ("config.data.packing=best_fit", "x.bin does not list", "concat"),
        prepare=write("x.bin", LOW),
    ),
    "documents that cannot be found": Case(
        f"{NEW} --config.data.paths=x.bin --config.eval.every=0",
        ("x.bin", "config.data.end_of_document", "cross_document_attention=true"),
        prepare=write("x.bin", LOW),
    ),
    "raw uint32": Case(
        f"{NEW} --config.data.paths=x.bin --config.eval.every=0",
        ("x.bin", "every second number", "config.data.raw_dtype=uint32"),
        prepare=write("x.bin", np.arange(70_000, 72_000, dtype="<u4").tobytes()),
    ),
    "damaged ends of documents": Case(
        NEW,
        ("data/train-ends.bin is damaged", "must increase", "copy it again"),
        prepare=overwrite("data/train-ends.bin"),
    ),
    "batches without room": Case(
        f"{NEW} --config.data.prefetch=1000000000",
        ("config.data.prefetch=1000000000", "of memory", "or less"),
    ),
    "a batch of more rows than there are": Case(
        f"{NEW} --config.data.batch_size=1000000",
        ("config.data.batch_size=1000000 is more than", "use at most"),
    ),
    "weights": Case(
        f"{NEW} --config.data.weights=1,2",
        ("config.data.weights=(1.0, 2.0)", "one number for each of the 1", "()"),
    ),
    "nothing is held out": Case(
        f"{NEW} --config.data.paths=whole",
        ("config.data.eval_paths=()", "'whole'", "--holdout", "config.eval.every=0"),
    ),
    "held-out tokens are trained on": Case(
        f"{NEW} --config.data.paths=whole --config.data.eval_paths=whole",
        ("held-out tokens of whole", "config.data.paths", "give other"),
    ),
    "two tokenizers": Case(
        f"{NEW} --config.data.paths=data,bpe",
        ("config.data.paths", "one tokenizer", "data by", "bpe by", "tokenize all"),
    ),
    # Going on with a run
    "other data": Case(
        f"{RESUME} --config.steps=6 --config.data.paths=other",
        ("the tokens of config.data.paths changed", "another --workdir"),
    ),
    "other tokenizer": Case(
        f"{RESUME} --config.steps=6 --config.data.paths=bpe",
        ("tokenizer was", "is now", "another --workdir"),
    ),
    "other batch size": Case(
        f"{RESUME} --config.steps=6 --config.data.batch_size=4",
        ("config.data.batch_size was 8 and is now 4", "another --workdir"),
    ),
    "other model": Case(
        f"{RESUME} --config.steps=6 --config.model.d_ff=64",
        ("--workdir=run", "config.model.d_ff: 32 -> 64", "--overwrite"),
    ),
    "other seed": Case(
        f"{RESUME} --config.steps=6 --config.seed=1",
        ("--workdir=run", "config.seed: 0 -> 1", "--overwrite"),
    ),
    "other optimizer": Case(
        f"{RESUME} --config.steps=6 --config.optimizer.name=lion",
        ("run/checkpoints/4", "optimizer", "opt_state", "another --workdir"),
    ),
    "fewer steps than saved": Case(
        f"{RESUME} --config.steps=3",
        ("config.steps=3 is below the saved step 4", "--overwrite"),
    ),
    "damaged config.json": Case(
        RESUME,
        ("run/config.json", "is not the JSON object", "restore it"),
        prepare=write("run/config.json", '{"steps": 4'),
    ),
    "damaged checkpoint": Case(
        f"{RESUME} --config.steps=6",
        ("no step of", "can be read", "back from a copy", "another --workdir"),
        status=FAILED,
        prepare=damage("run/checkpoints/*/state/**/*"),
    ),
    # The directory of a run
    "workdir is a file": Case(
        "train --config run.py --workdir run.py",
        ("--workdir=run.py", "cannot be made", "give a directory"),
    ),
    "workdir is below a file": Case(
        "train --config run.py --workdir run.py/run",
        ("--workdir=run.py/run", "cannot be made", "give a directory"),
    ),
    "workdir cannot be made": Case(
        "train --config run.py --workdir /proc/run",
        ("--workdir=/proc/run", "cannot be made", "give a directory"),
    ),
    "workdir is another's": Case(
        "train --config run.py --workdir data",
        ("--workdir=data has files but no run", "'eval-00000.bin'", "give a new"),
    ),
    "overwriting what is another's": Case(
        "train --config run.py --workdir mine --overwrite",
        ("--workdir=mine has files but no run", "thesis.tex", "give a new"),
        prepare=lambda folder: (
            write("mine/thesis.tex", "years of work")(folder),
            write("mine/checkpoints/draft.tex", "months of work")(folder),
        ),
    ),
    "overwriting another's config.json": Case(
        "train --config run.py --workdir gpt2 --overwrite",
        ("--workdir=gpt2", "config.json", "not of a run", "give a new"),
        prepare=lambda folder: (
            write("gpt2/config.json", '{"architectures": ["GPT2LMHeadModel"]}')(folder),
            write("gpt2/tokenizer/vocab.json", "{}")(folder),
        ),
    ),
    # Evaluation
    "evaluating no run": Case(
        "evaluate --workdir new", ("--workdir=new holds no run", "give the directory")
    ),
    "evaluating a step that is not there": Case(
        f"{EVALUATE} --step 99", ("--step=99", "[2, 4]", "one of the steps")
    ),
    "evaluating a step of no kind": Case(
        f"{EVALUATE} --step newest", ("--step=newest", "latest or best")
    ),
    "evaluating the best of none": Case(
        "evaluate --workdir unmeasured --step best",
        ("--step=best", "unmeasured", "[2]"),
    ),
    "evaluating before the first save": Case(
        EVALUATE,
        ("--step=latest", "run has no such save", "train it first"),
        prepare=remove("run/checkpoints"),
    ),
    "evaluating on nothing": Case(
        f"{EVALUATE} --config.data.paths=whole",
        ("config.data.eval_paths=()", "--holdout"),
    ),
    "evaluating after the data has gone": Case(
        EVALUATE, ("data does not exist", "give a folder"), prepare=remove("data")
    ),
    "evaluating another model": Case(
        f"{EVALUATE} --config.model.d_ff=64",
        ("run/checkpoints/4", "does not fit the model", "Use the config"),
    ),
    "evaluating with a setting that is gone": Case(
        EVALUATE,
        ("run/config.json", "config.model.colour is not a setting"),
        prepare=lambda folder: (folder / "run/config.json").write_text(
            (folder / "run/config.json")
            .read_text()
            .replace('"model": {', '"model": {"colour": "red",')
        ),
    ),
    # Generation
    "generating from no run": Case(
        "generate --workdir new", ("--workdir=new holds no run", "give the directory")
    ),
    "generating from a step that is not there": Case(
        f"{GENERATE} --step 99", ("--step=99", "[2, 4]", "one of the steps")
    ),
    "temperature": Case(
        f"{GENERATE} --temperature=-1", ("--temperature=-1", "must be 0 (the", "0.8")
    ),
    "temperature is no number": Case(
        f"{GENERATE} --temperature=warm", ("--temperature", "warm")
    ),
    "top_p": Case(f"{GENERATE} --top_p=2", ("--top_p=2", "to 1 (all tokens)")),
    "top_k": Case(f"{GENERATE} --top_k=-1", ("--top_k=-1", "at least 0")),
    "nothing to write": Case(
        f"{GENERATE} --prompt=a --max_tokens=0",
        ("--max_tokens=0", "from 1 to 2**31 - 1"),
    ),
    "negative seed": Case(f"{GENERATE} --seed=-1", ("--seed=-1", "0 to 2**32")),
    "too many devices": Case(
        f"{GENERATE} --prompt=a --devices=3", ("--devices=3", "from 1 to the 1")
    ),
    "prompt has a token that the model lacks": Case(
        f"{GENERATE} --tokenizer=large --prompt=return",
        ("prompt 0 has token", "vocab_size=264", "use the tokenizer of its data"),
    ),
    "tokenizer is not there": Case(
        f"{GENERATE} --tokenizer=nowhere.json", ("nowhere.json", "cannot be")
    ),
    "run without a tokenizer": Case(
        GENERATE,
        ("run has no tokenizer", "give --tokenizer"),
        prepare=remove("run/tokenizer"),
    ),
    "damaged tokenizer": Case(
        GENERATE,
        ("run/tokenizer/facts.json", "give --tokenizer"),
        prepare=write("run/tokenizer/facts.json", '{"kind": '),
    ),
    # Tokens
    "no text": Case(
        "tokenize --input nowhere.txt --output new",
        ("--input=nowhere.txt does not exist", "give"),
    ),
    "text is not UTF-8": Case(
        "tokenize --input x.txt --output new",
        ("--input=x.txt is not UTF-8", "byte 3 is 0xff"),
        prepare=write("x.txt", b"abc\xff"),
    ),
    "unknown tokenizer": Case(
        "tokenize --input run.py --output new --tokenizer gpt5",
        ("tokenizer gpt5 cannot be",),
    ),
    "tokens into another's folder": Case(
        "tokenize --input run.py --output mine --overwrite",
        ("--output=mine", "thesis.tex"),
        prepare=write("mine/thesis.tex", "years of work"),
    ),
}
AS_USERS_DO = (  # one of each command in a process of its own; the others are forks
    "damaged checkpoint",
    "evaluating a step that is not there",
    "temperature",
    "no text",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, run_command) -> Path:
    """A folder with a config, tokens of all kinds, and two finished runs."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "run.py").write_text(CONFIG)
    source = Path(__file__).parents[1]
    for command in (
        f"tokenize --input {source}/conftest.py --output data --holdout=0.2",
        f"tokenize --input {Path(__file__)} --output other --holdout=0.2",
        f"tokenize --input {source}/conftest.py --output whole --holdout=0",
        f"tokenize --input {source}/conftest.py --output bpe --tokenizer=bpe:258 "
        "--holdout=0.2",
        f"tokenize --input {source}/conftest.py --output large --tokenizer=bpe:400",
        "train --config run.py --workdir run",
        "train --config run.py --workdir unmeasured --config.eval.every=0 "
        "--config.steps=2",
    ):
        by = "--holdout_by=tail --workers=1" if command.startswith("tokenize") else ""
        ended = run_command(f"{command} {by}", folder)
        assert ended.status == 0, ended.stderr
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "folder")


def files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files but locks, which say nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def check_message(said: str, fragments: tuple[str, ...]):
    assert said.startswith("error: "), said
    assert said.count("error: ") == 1
    assert "Traceback" not in said and "Warning" not in said
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_message_and_loses_nothing(name, folder, run_command):
    case = CASES[name]
    if case.prepare is not None:
        case.prepare(folder)
    before = files(folder)
    env = {"JAX_NUM_CPU_DEVICES": str(case.devices)}
    ended = run_command(case.command, folder, **env)
    assert ended.status == case.status, ended.stdout + ended.stderr
    check_message(ended.stderr, case.fragments)
    after = files(folder)
    if case.starts:
        after = {path: after[path] for path in before}
    assert after == before
    assert case.starts or not (folder / "new").exists()


@pytest.mark.parametrize("name", AS_USERS_DO)
def test_wrong_input_in_a_process_of_its_own(name, folder):
    case = CASES[name]
    if case.prepare is not None:
        case.prepare(folder)
    program, *arguments = case.command.split()
    ended = subprocess.run(
        [sys.executable, "-m", f"jaxllm.{program}", *arguments],
        cwd=folder,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(case.devices)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == case.status
    check_message(ended.stderr, case.fragments)


def test_a_directory_in_use_is_refused(folder, run_command):
    with (folder / "run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = files(folder)
        ended = run_command(f"{RESUME} --overwrite", folder)
    assert ended.status == WRONG_INPUT
    check_message(ended.stderr, ("--workdir=run is in use", "wait until it ends"))
    assert files(folder) == before


# What only an administrator can set up.


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_refused(folder, run_command):
    with mounted(folder / "disk", "ro,size=1m"):
        ended = run_command("train --config run.py --workdir disk/run", folder)
        assert ended.status == WRONG_INPUT
        check_message(ended.stderr, ("--workdir=disk/run", "Read-only", "give a dir"))
        ended = run_command("train --config run.py --workdir disk", folder)
        assert ended.status == WRONG_INPUT
        check_message(ended.stderr, ("--workdir=disk", "cannot be written", "give a"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_directory_without_permission_is_refused(folder, run_command):
    (folder / "run").chmod(0o500)
    before = files(folder)
    ended = run_command(RESUME, folder)
    (folder / "run").chmod(0o700)
    assert ended.status == WRONG_INPUT
    check_message(ended.stderr, ("--workdir=run cannot be written", "give a directory"))
    assert files(folder) == before


@pytest.mark.parametrize("room", [0, 60_000])  # for not even the config; for it
def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_room(
    room, folder, run_command
):
    more = "train --config run.py --workdir disk/run --config.checkpoint.every=1"
    with mounted(folder / "disk", "size=2m"):
        assert run_command(f"{more} --config.steps=2", folder).status == 0
        filler = folder / "disk/filler"
        with filler.open("wb", buffering=0) as file:
            with pytest.raises(OSError) as error:
                while True:
                    file.write(b"x" * 4096)
            file.truncate(file.tell() - room)
        assert error.value.errno == errno.ENOSPC
        before = {n: c for n, c in files(folder / "disk/run").items() if "/2/" in n}
        ended = run_command(f"{more} --config.steps=4", folder)
        assert ended.status == FAILED, ended.stdout + ended.stderr
        check_message(ended.stderr, ("No space left on device", "same command"))
        after = files(folder / "disk/run")
        assert before and {name: after[name] for name in before} == before
        filler.unlink()
        assert run_command(f"{more} --config.steps=4", folder).status == 0
