# SPDX-License-Identifier: Apache-2.0
"""Command lines as they are typed: where they are written, and how each runs here.

They are found by reading: in blocks of documents, in code that a document quotes, in
docstrings of programs and configs, and in messages. `SMALLER` replaces their words,
`TINY` cuts configs down, and the data is a few made-up files. `ELSEWHERE` lists what is
not run.
"""

import ast
import functools
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hf.cases import write_folder

from jaxllm.text.tokenizers import train_bpe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.name != "settings.md"  # made by a script, which has a test
]
WITH_BLOCKS = [path for path in DOCUMENTS if "```" in path.read_text()]
PROGRAMS = ("jaxllm", "sharding", "pallas_kernels", "scripts", "configs")
# A command that does something; `python -m jaxllm.train` alone only names a program.
COMMAND = re.compile(
    r"([A-Z_]+=\S+ )*(\.venv/bin/)?"
    r"(python[\d.]* (-m \S+ \S|-c |scripts/)|(pip|tensorboard|zcat|gzip|bash) \S"
    r"|(make|sbatch|srun) \S|scripts/\S+ \S)"
)

ELSEWHERE = {  # beginning of a command: why it does not run here
    "make quickstart": "installs; run on a fresh clone before a release",
    ".venv/bin/python -m jaxllm.generate": "needs the run of make quickstart",
    "make check": "runs in CI",
    "make test": "is what runs this",
    "make format": "would change the files under test",
    "make notebook": "tests/house/test_notebook.py compares what it makes",
    "make .venv/cuda": "installs; part of make test-slow",
    ".venv/bin/python scripts/compile_step.py": "tests/step/test_step_offline.py does",
    ".venv/bin/python scripts/settings_table.py": "tests/house/test_flags.py makes it",
    "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m jaxllm.compare_meshes": (
        "minutes; tests/meshes/test_compare_meshes.py compares less"
    ),
    "python scripts/compare_processes.py": "half an hour, of eight processes' time",
    "python scripts/measure_bubble.py": "a minute of sleep",
    'PROCESSES="4 2 1"': "tests/cluster/test_elastic.py, with fewer processes",
    "python3.12 -m venv": "part of make test",
    ". .venv/bin/activate": "part of make test",
    "pip install": "part of make test",
    "sbatch": "tests/cluster/test_slurm.py runs it, where there is a SLURM",
    "SWEEP=sweep.txt sbatch": "so does it",
    "export SRUN": "needs a cluster with containers",
    "scripts/slurm/install.sh": "installs; .ci/run does",
    "python scripts/slurm": "tests/cluster/test_slurm.py, where there is a SLURM",
    "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 python scripts/chaos.py": (
        "takes an hour; tests/run/test_resume.py runs it for less"
    ),
    "scripts/fuzz_settings.py": "hours; tests/plan/test_fuzz_settings.py draws less",
    "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python scripts/fuzz_settings.py": "so",
    "python scripts/fuzz_runs.py": "hours; tests/run/test_fuzz_runs.py damages less",
    "python scripts/bench_data.py": "a minute, and a calm machine",
    "python -m zipfile -e": "the user names the archive",
    "python -m jaxllm.tokenize --input -": "tests/text/test_inputs.py pipes text in",
    "python -m jaxllm.hf": "tests/hf/test_commands.py, on a small model",
    "python -m jaxllm.generate --workdir runs/base": "needs a model with a tokenizer",
    "python -m jaxllm.train --config configs/continue.py": "tests/hf/test_commands.py",
    ".venv/bin/pre-commit install": "would change the git hooks",
    # In docstrings, in quoted code and in messages.
    "JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python -m jaxllm.compare_meshes --config "
    "configs/any_mesh.py": "ten minutes",
    "TESTS=training scripts/gpu_suite.sh": "needs a GPU",
    ".venv/bin/python -m pytest": "is what runs this",
    "pip install jaxllm[parquet]": "installs",
    "python -m pallas_kernels.bench": "tests/kernels/test_bench.py, on tiny shapes",
    "python -m pallas_kernels.offline attention": "tests/kernels/test_offline.py does",
    "python -m pallas_kernels.offline.resources operation": "as this",
    "python -m pallas_kernels.offline.resources --tiles": "hours; as this",
    "python scripts/bench_step": "needs a GPU; tests/house/test_bench_step.py",
    "python scripts/bench_train.py": "minutes, and a calm machine",
    "python scripts/chaos.py": "takes an hour; tests/run/test_resume.py does less",
    "python scripts/compile_step.py": "tests/step/test_step_offline.py does",
    "python scripts/measure_import.py": "minutes, and a calm machine",
    "python scripts/longest.py": "tests/house/test_longest.py does",
    "python scripts/settings_table.py": "tests/house/test_flags.py makes it",
    "scripts/compile_step.py": "tests/step/test_step_offline.py does",
    "srun": "tests/cluster/test_slurm.py, where there is a SLURM",
    "tensorboard": "runs for ever",
}
RUNS_HERE = (
    *("python -m jaxllm.", "python -m pallas_kernels.offline.resources --predict"),
    "gzip -dc corpus.txt.gz | python -m jaxllm.",
    'python -c "import json',
)
SMALLER = {
    "python:stdlib": "texts",
    "bpe:4096": "bpe:300",
    "bpe:32768": "bpe:300",
    "--config.steps=1000": "--config.steps=6",
    "--config.steps=60 ": "--config.steps=13 ",
    "--max_tokens 100": "--max_tokens 4",
    "JAX_NUM_CPU_DEVICES=8": "JAX_NUM_CPU_DEVICES=4",
    "--step 1234": "--step 2",
    "--batch 1240": "--batch 1",
    '--meshes "data=8 fsdp=4,tensor=2" --steps 20': "--meshes data=4 --steps 2",
    # What a reader, or a message, puts in.
    "--input TEXT": "--input texts",
    "--output DIR": "--output data/new",
    "--output {path}": "--output data/new",
    "--input {file}": "--input input.txt",
    "--workdir RUN": "--workdir runs/x",
    "--step {self.step}": "--step 2",
    "--batch {self.batch}": "--batch 1",
}
TINY = {
    "steps": 4,
    "model.vocab_size": 512,
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.d_ff": 32,
    "data.sequence_length": 32,
    "data.batch_size": 8,
    "optimizer.warmup_steps": 1,
    "eval.every": 4,
    "eval.batches": 1,
    "checkpoint.every": 4,
    "logging.every": 1,
}
TINY_CONFIG = """\
from jaxllm.config import load_config

def get_config():
    return load_config({path!r}, {tiny!r})
"""


def blocks(document: Path) -> list[tuple[str, str]]:
    """Returns the language and the text of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)
    assert 2 * len(found) == len(re.findall("^```", document.read_text(), re.M))
    return found


def commands(text: str) -> list[str]:
    """Returns the commands of a bash block, each on one line, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)) for line in lines]
    return [command.strip() for command in commands if command.strip()]


def is_elsewhere(command: str) -> bool:
    return command.startswith(tuple(ELSEWHERE))


def without_environment(command: str) -> str:
    return re.sub(r"^([A-Z_]+=\S+ )+", "", command)


def smaller(command: str) -> str:
    for word, smaller in SMALLER.items():
        command = command.replace(word, smaller)
    return command


def write_tiny_config(path: Path, full: Path, overrides: Mapping[str, Any] = TINY):
    """Writes a config file that reads another one and cuts it down."""
    path.write_text(TINY_CONFIG.format(path=str(full), tiny=overrides))


def run(command: str, folder: Path, run_python):
    """Runs what bash would; Python alone in a fork, where it need not start."""
    words = shlex.split(command)
    number = next(i for i, word in enumerate(words) if "=" not in word)
    if words[number] == "python" and not re.search(r"[|<>&;*?$`~]", command):
        variables = dict(word.split("=", 1) for word in words[:number])
        ended = run_python(words[number + 1 :], folder, **variables)
        assert ended.status == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        return
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((bin_folder, os.environ["PATH"])),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def make_data(folder: Path):
    """Makes the files that the documents take for granted."""
    (folder / "texts").mkdir()
    texts = [f"def f{n}(x):\n    return x * {n} + len(str(x))\n" for n in range(400)]
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "input.txt").write_text("\n".join(texts))
    with gzip.open(folder / "corpus.txt.gz", "wt") as file:
        file.write("\n".join(texts))
    lines = [json.dumps({"body": text}) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"body": texts})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    (folder / "tokenizer.json").write_bytes(train_bpe(texts, 300).json)
    write_folder("qwen2", folder / "models" / "base")
    (folder / "owt").mkdir()
    for name in ("train", "val"):
        np.arange(1000, dtype="<u2").tofile(folder / "owt" / f"{name}.bin")


def inline_code(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", name) for name in re.findall(r"`([^`]+)`", text)]


@functools.cache
def written_elsewhere() -> dict[str, str]:
    """Returns the command lines outside of documents' blocks, and where one is."""
    found = {}
    for path in DOCUMENTS:
        if path.name != "CHANGELOG.md":  # names what has changed
            found |= dict.fromkeys(filter(COMMAND.match, inline_code(path)), path.name)
    for package in PROGRAMS:
        for path in sorted((ROOT / package).rglob("*.py")):
            lines = _variants(_in_strings(ast.parse(path.read_text())))
            place = str(path.relative_to(ROOT))
            found |= dict.fromkeys(filter(COMMAND.match, lines), place)
    return found


def _in_strings(tree: ast.Module) -> Iterator[str]:
    """Yields the commands of a module's docstring, and those quoted in its texts."""
    lines = (ast.get_docstring(tree) or "").replace("\\\n", " ").splitlines()
    for line, others in ((line, lines[i + 1 :]) for i, line in enumerate(lines)):
        if re.match(r"([A-Z_]+=\S+ )*python ", line.strip()):
            indent = len(line) - len(line.lstrip())
            for other in others:  # the rest of a long one is indented further
                if not re.match(rf" {{{indent + 1},}}(\[|--)", other):
                    break
                line += other
            yield re.sub(r"\s+", " ", line).strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(map(_as_written, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        for quoted in re.findall(r"`([^`]+)`", text):
            line = re.sub(r"\s+", " ", quoted)
            if COMMAND.match(line):
                yield line


def _as_written(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    return f"{{{ast.unparse(part.value)}}}"


def _variants(lines: Iterator[str]) -> Iterator[str]:
    """Yields each line without and with all that it has in brackets."""
    optional = re.compile(r" \[([^]]*)\]")
    for line in lines:
        yield optional.sub("", line).removesuffix(" ...")
        # "[--prompt ...]" is another of the same; "a.b=v" stands for any setting.
        full = re.sub(r" \[(--\w+ \.\.\.|--config\.a\.b=v \.\.\.)\]", "", line)
        yield optional.sub(r" \1", full).replace(" ...", "")
