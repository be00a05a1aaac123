# SPDX-License-Identifier: Apache-2.0
"""What the documents say: their commands run, their links and names exist.

The blocks of a document run in order in a folder of their own, as its reader would run
them, but small: `SMALLER` replaces words of commands, each config is cut down by
`TINY`, and the data is a few made-up files. `ELSEWHERE` lists what is not run here.
"""

import gzip
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxllm import flags, tokenize
from jaxllm.config.fields import section_names, setting_types
from jaxllm.text.tokenizers import train_bpe
from sharding import rules
from sharding.alphabet import LETTERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.name != "settings.md"  # made by a script, which has a test
]
WITH_BLOCKS = [path for path in DOCUMENTS if "```" in path.read_text()]
TREES = ("jaxllm", "sharding", "pallas_kernels", "configs", "scripts", "tests", "docs")

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
    ".venv/bin/pre-commit install": "would change the git hooks",
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


@pytest.mark.parametrize("document", WITH_BLOCKS, ids=lambda path: path.name)
def test_the_commands_of_a_document_run(document, tmp_path, run_python):
    _make_data(tmp_path)
    (tmp_path / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.py"):
        _write_tiny_config(tmp_path / "configs" / config.name, config)
    for language, text in _blocks(document):
        if language == "bash":
            commands = [each for each in _commands(text) if not _is_elsewhere(each)]
            for command in commands:
                assert _without_environment(command).startswith(RUNS_HERE), (
                    f"{document.name}: {command!r} is not known; see test_docs.py"
                )
                _run(_smaller(command), tmp_path, run_python)
        elif language == "python" and (file := _file_name(text)):
            (tmp_path / "written").mkdir(exist_ok=True)
            (tmp_path / "written" / file.name).write_text(text)
            _write_tiny_config(tmp_path / file, tmp_path / "written" / file.name)
        elif language == "python":
            ended = run_python(["-c", text], tmp_path)
            assert ended.status == 0, f"{text}\n{ended.stdout}\n{ended.stderr}"
        else:
            assert language == "text", f"{document.name}: a block of {language!r}"
    if document.name == "reliability.md":
        assert (tmp_path / "runs" / "profiled" / "profile" / "steps-10-12.txt").exists()
    if document.name == "README.md":
        made = {path.name for path in (tmp_path / "runs" / "first").iterdir()}
        assert set(_first_column(document, "in `--workdir`")) == made - {".lock"}


def test_each_reason_not_to_run_a_command_is_needed():
    commands = [
        command
        for document in WITH_BLOCKS
        for language, text in _blocks(document)
        if language == "bash"
        for command in _commands(text)
    ]
    for beginning in ELSEWHERE:
        assert any(command.startswith(beginning) for command in commands), beginning
    for word in SMALLER:
        assert any(word in command for command in commands), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_in_backticks_exists(document):
    options = _known_options()
    written = {str(_file_name(text)) for _, text in _blocks(document)}
    for name in _inline_code(document):
        if re.fullmatch(rf"({'|'.join(TREES)})/[\w./-]*", name):
            assert (ROOT / name).exists() or name in written, name
        elif re.fullmatch(r"(jaxllm|sharding|pallas_kernels)(\.\w+)+", name):
            _resolve(name)
        elif re.fullmatch(r"config\.\w+(\.\w+)?", name) and name != "config.json":
            sections = section_names().values()
            assert name.removeprefix("config.") in setting_types() or name in sections
        elif match := re.match(r"--(\w+)", name):
            assert match[1].removeprefix("no") in options or match[1] in options, name
        elif match := re.match(r"make (\w+)$", name):
            assert f"\n{match[1]}:" in (ROOT / "Makefile").read_text(), name


def test_the_readme_lists_the_exit_statuses():
    listed = {
        int(status) for status in _first_column(ROOT / "README.md", "exit status")
    }
    for module in (flags, tokenize):
        assert listed == {
            module.FINISHED,
            module.FAILED,
            module.WRONG_INPUT,
            module.RESUMABLE,
        }


def test_the_readme_lists_every_command():
    programs = {
        f"python -m jaxllm.{path.stem}"
        for path in (ROOT / "jaxllm").glob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text()
    } | {
        f"python -m jaxllm.{path.parent.name}"
        for path in (ROOT / "jaxllm").glob("*/__main__.py")
    }
    assert set(_first_column(ROOT / "README.md", "command")) == programs


def test_the_readme_says_how_many_lines_its_reading_path_has():
    text = (ROOT / "README.md").read_text()
    words = " ".join(text.split())
    _, _, story = words.partition("The path of one training step is about ")
    promised = int(story.split()[0].replace(",", ""))
    path = re.findall(r"`(jaxllm/[\w/]+\.py)`", story.partition("[How it works]")[0])
    assert len(path) > 10
    counted = sum(len((ROOT / name).read_text().splitlines()) for name in path)
    assert abs(counted - promised) <= 0.05 * promised, counted
    assert len(text.splitlines()) < 200


def test_the_terms_are_in_order_and_the_tables_are_those_of_the_code():
    page = ROOT / "docs" / "terms.md"
    terms = _first_column(page, "term")
    assert len(terms) > 60
    assert terms == sorted(terms, key=lambda term: term.lower().replace("-", " "))
    _, _, table = page.read_text().partition("| STORAGE |\n|---|---|---|---|---|\n")
    rows = [
        [cell.strip() for cell in row.replace("`", "").split("|")[1:-1]]
        for row in table.split("\n\n")[0].splitlines()
    ]
    assert [tuple(row[:2]) for row in rows] == list(LETTERS.items())
    for letter, _, *written in rows:
        tables = (rules.COMPUTE, rules.RESIDUAL, rules.STORAGE)
        assert written == [", ".join(table.get(letter, ())) for table in tables], letter


def test_documents_are_ascii_and_fit_a_screen():
    for document in DOCUMENTS:
        for line in document.read_text(encoding="ascii").splitlines():
            assert len(line) <= 88 or line.startswith("|"), f"{document.name}: {line}"


def _blocks(document: Path) -> list[tuple[str, str]]:
    """Returns the language and the text of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)
    assert 2 * len(found) == len(re.findall("^```", document.read_text(), re.M))
    return found


def _commands(text: str) -> list[str]:
    """Returns the commands of a bash block, each on one line, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)) for line in lines]
    return [command.strip() for command in commands if command.strip()]


def _is_elsewhere(command: str) -> bool:
    return command.startswith(tuple(ELSEWHERE))


def _without_environment(command: str) -> str:
    return re.sub(r"^([A-Z_]+=\S+ )+", "", command)


def _smaller(command: str) -> str:
    for word, smaller in SMALLER.items():
        command = command.replace(word, smaller)
    return command


def _file_name(text: str) -> Path | None:
    """Returns the path that a block names in its first line, if it does."""
    match = re.match(r"# (\w+/\w+\.py)\n", text)
    return Path(match[1]) if match else None


def _write_tiny_config(path: Path, full: Path):
    path.write_text(TINY_CONFIG.format(path=str(full), tiny=TINY))


def _run(command: str, folder: Path, run_python):
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


def _make_data(folder: Path):
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
    (folder / "owt").mkdir()
    for name in ("train", "val"):
        np.arange(1000, dtype="<u2").tofile(folder / "owt" / f"{name}.bin")


def _inline_code(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", name) for name in re.findall(r"`([^`]+)`", text)]


def _first_column(document: Path, header: str) -> list[str]:
    """Returns the first cells of the table whose first header cell is this."""
    _, _, table = document.read_text().partition(f"| {header} |")
    rows = table.split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip().strip("`") for row in rows]


def _known_options() -> set[str]:
    defined = re.compile(r'DEFINE_\w+\(\s*"(\w+)"')
    names = {"help", "helpfull", *(f"config.{name}" for name in setting_types())}
    for path in (ROOT / "jaxllm").glob("*.py"):
        for match in defined.finditer(path.read_text()):
            names.add(match[1])
    return names


def _resolve(name: str):
    """Imports what a dotted name names: a module, or something in one."""
    module, _, member = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), member), name
