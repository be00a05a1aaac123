# SPDX-License-Identifier: Apache-2.0
"""Every command line of a docstring, of quoted code or of a message runs as it is.

Documents' blocks run in `test_docs.py`. Here a line runs by itself, in a folder that is
not this repository, beside the data, configs and runs that lines speak of.
"""

import re
import shutil
from pathlib import Path

import pytest

from typed_commands import (
    ROOT,
    RUNS_HERE,
    TINY,
    is_elsewhere,
    make_data,
    run,
    smaller,
    without_environment,
    write_tiny_config,
    written_elsewhere,
)

LINES = [line for line in written_elsewhere() if not is_elsewhere(line)]
# A compilation a mesh; a training for each config, which documents do as well.
LONG = re.compile(r"compare_meshes|jaxllm\.train --config configs/(?!x)\S+ --workdir")
RUN = {**TINY, "steps": 4, "checkpoint.every": 2, "checkpoint.keep_best": True}


@pytest.fixture(scope="session")
def made(tmp_path_factory, run_python) -> Path:
    """A folder with texts, tokens, configs and equal runs."""
    folder = tmp_path_factory.mktemp("typed")
    make_data(folder)
    (folder / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.py"):
        write_tiny_config(folder / "configs" / config.name, config)
    write_tiny_config(
        folder / "configs" / "x.py", ROOT / "configs" / "quickstart.py", RUN
    )
    for command in (
        "python -m jaxllm.tokenize --input texts --output data/stdlib "
        "--tokenizer bpe:300 --holdout 0.1",
        "python -m jaxllm.train --config configs/x.py --workdir runs/x",
    ):
        run(command, folder, run_python)
    for name in ("y", "first"):
        shutil.copytree(folder / "runs/x", folder / "runs" / name)
    shutil.copytree(folder / "data/stdlib", folder / "data/shakespeare")
    return folder


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.slow) if LONG.search(line) else line
        for line in LINES
    ],
)
def test_a_command_line_runs_as_it_is_written(line, made, tmp_path, run_python):
    place = written_elsewhere()[line]
    assert without_environment(line).startswith(RUNS_HERE), (
        f"{place}: {line!r} is not known; see typed_commands.py"
    )
    folder, command = shutil.copytree(made, tmp_path / "folder"), smaller(line)
    if output := re.search(r"--output (\S+)", command):
        shutil.rmtree(folder / output[1], ignore_errors=True)
    run(command, folder, run_python)


def test_lines_are_found_where_they_are_written():
    places = set(written_elsewhere().values())
    assert {"jaxllm/train.py", "jaxllm/checkpoint/__main__.py"} <= places
    assert {"configs/shakespeare.py", "jaxllm/data/formats.py", "README.md"} <= places
