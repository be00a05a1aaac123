# SPDX-License-Identifier: Apache-2.0
"""Tokens appear whole or not at all, however the command ends."""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jaxllm import tokenize
from jaxllm.data.formats import verify
from jaxllm.text.token_folder import TokenSettings

LINES = [
    f"document {i}: {'word ' * (i % 50)}fin, na\u00efve \u6c34\n" for i in range(300)
]


def run(*arguments: str) -> int:
    return tokenize.main(["tokenize", *arguments])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jaxllm.tokenize", *arguments]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def write_jsonl(path, texts, field="text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def text(tmp_path) -> str:
    return write_jsonl(tmp_path / "text.jsonl", LINES)


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "out")


def test_a_finished_output_is_left_alone(text, out, capsys):
    flags = [f"--input={text}", f"--output={out}"]
    assert run(*flags) == 0
    before = contents(out)
    capsys.readouterr()
    os.chmod(out, 0o555)
    assert run(*flags) == 0
    assert "already done" in capsys.readouterr().out
    assert contents(out) == before


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--tokenizer=bpe:300", "--tokenizer=bytes, not bpe:300"),
        ("--holdout=0.5", "--holdout=0.01, not 0.5"),
        ("--shard_tokens=9999", "--shard_tokens=100000000, not 9999"),
        ("touch", "before it changed"),
    ],
)
def test_an_output_made_otherwise_is_replaced_only_on_demand(
    text, out, flag, message, capsys
):
    assert run(f"--input={text}", f"--output={out}") == 0
    (pathlib.Path(out) / "notes.md").write_text("mine")
    before = contents(out)
    flags = [f"--input={text}", f"--output={out}"]
    if flag == "touch":
        os.utime(text, (1, 1))
    else:
        flags.append(flag)
    assert run(*flags) == 2
    assert message in capsys.readouterr().err
    assert contents(out) == before
    assert run(*flags, "--overwrite") == 0
    verify(out)
    assert contents(out)["notes.md"] == b"mine"
    assert "already done" not in capsys.readouterr().out


def test_an_output_made_before_a_setting_existed_is_still_done(text, out, capsys):
    flags = [f"--input={text}", f"--output={out}"]
    assert run(*flags) == 0
    path = pathlib.Path(out) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["skip_invalid_rows"]
    path.write_text(json.dumps(manifest))
    assert run(*flags) == 0
    assert "already done" in capsys.readouterr().out
    assert run(*flags, "--skip_invalid_rows") == 2
    assert "made with --skip_invalid_rows=False, not True" in capsys.readouterr().err


KILL_POINTS = ((os, "replace"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"))


class Killed(BaseException):
    """As after kill -9: no code of the program runs after it."""


def test_a_move_that_was_killed_anywhere_is_completed_by_the_next_command(
    tmp_path, text, monkeypatch
):
    """An output is replaced by another; one kill after each change of a file name."""
    old = [f"--input={text}", "--tokenizer=bpe:300", "--shard_tokens=9999"]
    new = [f"--input={text}", "--tokenizer=bytes", "--shard_tokens=20000"]
    undisturbed = str(tmp_path / "undisturbed")
    assert run(*new, f"--output={undisturbed}") == 0
    moment = 0
    for moment in itertools.count():
        out = str(tmp_path / f"killed-{moment}")
        assert run(*old, f"--output={out}") == 0
        left = moment

        def count(function):
            def counted(*names, **keywords):
                nonlocal left
                if left <= 0:
                    raise Killed
                left -= 1
                return function(*names, **keywords)

            return counted

        with monkeypatch.context() as patch:
            for module, name in KILL_POINTS:
                patch.setattr(module, name, count(getattr(module, name)))
            try:
                status = run(*new, f"--output={out}", "--overwrite")
            except Killed:
                status = None
        if status == 0:
            break
        if not os.path.exists(f"{out}/manifest.json"):
            assert run(*new, f"--output={out}") == 0
        elif (
            run(*new, f"--output={out}") == 2
        ):  # killed before the move: the old is whole
            verify(out)
            assert run(*new, f"--output={out}", "--overwrite") == 0
        shutil.rmtree(f"{out}/.jaxllm-partial", ignore_errors=True)
        assert contents(out) == contents(undisturbed), moment
    assert moment > 5


LONG = b"".join(b'{"text": "%d %s"}\n' % (i, b"long " * 200) for i in range(9000))
LONG_FLAGS = ["--input=-", "--stdin_format=jsonl", "--workers=2", "--holdout_by=tail"]


def give_stdin(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def wait_for(condition, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def has_tokens(out) -> bool:
    path = f"{out}/.jaxllm-partial/train-00000.bin"
    return os.path.exists(path) and os.path.getsize(path) > 0


def is_alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    threads = pathlib.Path(f"/proc/{pid}/task").iterdir()
    found = [(thread / "children").read_text().split() for thread in threads]
    return [int(child) for each in found for child in each]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The tokens of LONG."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        give_stdin(patch, LONG)
        assert run(*LONG_FLAGS, f"--output={folder / 'tokens'}") == 0
    return contents(folder / "tokens")


def start_and_wait(out) -> subprocess.Popen:
    """Starts a command that has written some tokens and waits for more text."""
    process = subprocess.Popen(
        command(*LONG_FLAGS, f"--output={out}"),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(LONG[:-1])
    process.stdin.flush()
    wait_for(lambda: has_tokens(out))
    return process


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_after_an_interruption_the_same_command_gives_the_same_tokens(
    undisturbed, out, kind, monkeypatch
):
    process = start_and_wait(out)
    workers = children(process.pid)
    assert len(workers) >= 2
    # Ctrl-C in a terminal reaches the workers too.
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    errors = process.communicate(timeout=30)[1].decode()
    wait_for(lambda: not any(is_alive(pid) for pid in workers))
    assert not os.path.exists(f"{out}/manifest.json")
    if kind == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        assert not os.path.exists(out)
        assert "interrupted" in errors and "Traceback" not in errors
    give_stdin(monkeypatch, LONG)
    assert run(*LONG_FLAGS, f"--output={out}") == 0
    assert contents(out) == undisturbed


def test_two_commands_do_not_write_one_output(undisturbed, out, capsys, monkeypatch):
    first = start_and_wait(out)
    give_stdin(monkeypatch, LONG)
    assert run(*LONG_FLAGS, f"--output={out}") == 2
    assert "being written by another command" in capsys.readouterr().err
    first.communicate(LONG[-1:], timeout=30)
    assert first.returncode == 0
    assert contents(out) == undisturbed


def test_a_full_disk_is_one_message_and_leaves_nothing(text, out):
    # A shell sets the limit, of 8 blocks of 512 bytes: forking this process, which may
    # run JAX's threads, would be a warning.
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh"]
    result = subprocess.run(
        [*limited, *command(f"--input={text}", f"--output={out}")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "cannot be written" in result.stderr and "free some space" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not os.path.exists(out)


def test_the_program_starts_without_jax(text, out):
    program = f"""
import sys
from jaxllm import tokenize
assert tokenize.main(["tokenize", "--input={text}", "--output={out}"]) == 0
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_names_every_flag(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "python:stdlib" in text
    names = [field.name for field in dataclasses.fields(TokenSettings)]
    flags = {name for name in names if not name.endswith("_sha256")}
    flags |= {"output", "workers", "overwrite", "max_lost"}
    assert all(f"  --{name} " in text for name in flags)


def test_an_empty_held_out_part_is_a_warning(tmp_path, out, capsys):
    text = write_jsonl(tmp_path / "x.jsonl", ["a", ""])
    assert run(f"--input={text}", f"--output={out}", "--holdout=1e-9") == 0
    warnings = capsys.readouterr().err
    assert "holds out none of 1 documents" in warnings
    assert "1 documents left out: empty" in warnings


def test_finished_standard_input_cannot_be_compared(out, capsys, monkeypatch):
    for status in (0, 2):
        give_stdin(monkeypatch, b"some text")
        assert run("--input=-", f"--output={out}", "--holdout=0") == status
    assert "cannot be known" in capsys.readouterr().err


def test_progress_without_a_terminal_is_lines_with_the_time_left(
    text, out, capsys, monkeypatch
):
    monkeypatch.setattr("jaxllm.text.progress._LINE_EVERY_S", 0.0)
    assert run(f"--input={text}", f"--output={out}") == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("tokenizing: ") and line.endswith("100%, 0 s left")
