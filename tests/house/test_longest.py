# SPDX-License-Identifier: Apache-2.0
"""The script that prints what is longest, and fails far beyond that."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "longest.py"


def run(*arguments: str) -> tuple[int, list[list[str]]]:
    """Runs the script; returns its exit status and the words of its lines."""
    command = [sys.executable, str(SCRIPT), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stderr == ""
    return ended.returncode, [line.split() for line in ended.stdout.splitlines()]


def function(name: str, lines: int) -> str:
    """Returns a function with a docstring, and a body of so many lines."""
    body = "    x = 1\n" * (lines - 1)
    return f'def {name}():\n    """Docs\n\n    of three lines."""\n{body}    return x\n'


def plant(folder: Path, *, file: int, body: int):
    package = folder / "jaxllm" / "models"
    package.mkdir(parents=True)
    (package / "long.py").write_text("\n" * file)
    source = "".join(function(f"f{i}", i + 1) for i in range(1, 12))
    (package / "functions.py").write_text(source + function("long", body))


def test_ten_are_shown_of_each_and_the_packages_are_within_the_limits():
    status, lines = run()
    heads = [i for i, words in enumerate(lines) if words[-1].endswith(":")]
    assert heads == [0, 11] and len(lines) == 22
    assert int(lines[0][-1].rstrip(":")) > 100
    assert int(lines[11][-1].rstrip(":")) > 1000
    assert status == 0
    for first in (1, 12):
        lengths = [int(words[0]) for words in lines[first : first + 10]]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    "planted, status, too_long",
    [
        (dict(file=400, body=80), 0, []),
        (dict(file=401, body=80), 1, ["jaxllm/models/long.py"]),
        (dict(file=400, body=81), 1, ["long"]),
    ],
)
def test_only_what_is_beyond_the_limits_fails(planted, status, too_long, tmp_path):
    plant(tmp_path, **planted)
    found, lines = run(str(tmp_path))
    assert found == status
    # The last words of such a line: "NAME more than LIMIT".
    assert [
        words[-4] for words in lines if words[-3:-1] == ["more", "than"]
    ] == too_long
    lengths = {words[-1]: words[0] for words in lines}
    assert lengths["f11"] == "12"  # without its docstring
