# SPDX-License-Identifier: Apache-2.0
"""Every kind of file gives its documents, or a remedy that works."""

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm import tokenize
from jaxllm.data.formats import open_tokens
from jaxllm.text import rows
from jaxllm.text.tokenizers import load_tokenizer

TEXTS = ["one\n", "two {} \u6c34", '"[{"text": "three"}]"']
LINES = "".join(
    json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)
)
ARRAY = json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=2)
zstd = functools.partial(pyarrow.Codec("zstd").compress, asbytes=True)
COMPRESS = {  # some in two parts, which is one file
    ".gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd(data[:9]) + zstd(data[9:]),
}


def run(tmp_path, *arguments: str) -> int:
    out = f"--output={tmp_path / 'out'}"
    return tokenize.main(["tokenize", out, "--holdout=0", *arguments])


def documents(tmp_path) -> list[str]:
    split = open_tokens(str(tmp_path / "out"), "train")
    assert split is not None and split.document_ends is not None
    decode = load_tokenizer(str(tmp_path / "out")).decode
    ends = split.document_ends.tolist()
    return [
        decode(split.slice(start, stop).tolist())
        for start, stop in zip([0, *ends], ends, strict=False)
    ]


def read(tmp_path, *arguments: str) -> list[str]:
    assert run(tmp_path, *arguments) == 0
    return documents(tmp_path)


@pytest.mark.parametrize("extension", ["", *COMPRESS])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "array.json", "x.txt"])
def test_files_are_read_by_their_content_and_compression(tmp_path, name, extension):
    content = {"x.txt": TEXTS[1], "array.json": "\ufeff " + ARRAY}.get(name, LINES)
    path = tmp_path / (name + extension)
    path.write_bytes(COMPRESS.get(extension, bytes)(content.encode()))
    expected = [TEXTS[1]] if name == "x.txt" else TEXTS
    assert read(tmp_path, f"--input={path}") == expected


@pytest.mark.parametrize("extension", COMPRESS)
def test_a_compressed_file_that_is_cut_off_or_damaged_is_refused(
    tmp_path, extension, capsys
):
    whole = COMPRESS[extension](os.urandom(2**16).hex().encode())
    path = tmp_path / f"x.txt{extension}"
    for content in (whole[:-9], whole[:99], b"text", whole[:50] + b"x" * 99):
        path.write_bytes(content)
        assert run(tmp_path, f"--input={path}") == 2
        assert f"{path} cannot be read as " in capsys.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)


@given(st.lists(JSON), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_an_array_is_read_in_any_blocks(values, indent, is_ascii, size):
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    content = text.encode(errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(UnicodeDecodeError):
        patch.setattr(rows, "_BLOCK_BYTES", size)
        assert list(rows._Array(io.BytesIO(content))) == values
        for wrong in (content[:-1], content + b"1", b"[1 2]", b"[,]", b"[1,]", b"{}"):
            with pytest.raises(ValueError):
                list(rows._Array(io.BytesIO(wrong)))


def test_the_mark_of_an_encoding_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    inputs = [f"--input={tmp_path}/{name}" for name in ("a.txt", "b.txt", "c.jsonl")]
    assert read(tmp_path, *inputs) == ["a\ufeff", *TEXTS]


@pytest.mark.parametrize("content, name", [(LINES, "y.jsonl"), (ARRAY, "y.json")])
@pytest.mark.parametrize("extension", ["", ".gz"])
def test_json_named_as_text_is_asked_about_and_each_remedy_works(
    tmp_path, content, name, extension, capsys
):
    path = tmp_path / f"x.txt{extension}"
    path.write_bytes(COMPRESS.get(extension, bytes)(content.encode()))
    assert run(tmp_path, f"--input={path}") == 2
    error = capsys.readouterr().err
    assert f"name it {os.path.splitext(name)[1]}. To tokenize the JSON itself" in error
    assert read(tmp_path, f"--input={path}", "--text_field=none") == [content]
    path.rename(tmp_path / (name + extension))
    flags = [f"--input={tmp_path / (name + extension)}", "--overwrite"]
    assert read(tmp_path, *flags) == TEXTS


def give_stdin(monkeypatch, content: str):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def test_json_on_standard_input_is_asked_about_and_each_remedy_works(
    tmp_path, capsys, monkeypatch
):
    give_stdin(monkeypatch, ARRAY)
    assert run(tmp_path, "--input=-") == 2
    assert "write it to a .json file and give that" in capsys.readouterr().err
    give_stdin(monkeypatch, LINES)
    assert run(tmp_path, "--input=-") == 2
    assert "give --stdin_format=jsonl" in capsys.readouterr().err
    give_stdin(monkeypatch, LINES)
    assert read(tmp_path, "--input=-", "--stdin_format=jsonl") == TEXTS


def test_a_long_first_row_is_json_too(tmp_path, capsys):
    (tmp_path / "x.txt").write_text('{"text": "' + "a" * 2**20 + '"}\n')
    assert run(tmp_path, f"--input={tmp_path}/x.txt") == 2
    assert "begins like JSON with the field 'text'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{x} = 1", '{"a": 1}', "[{}]", "{" * 9999, "[1, 2]"])
def test_text_that_is_no_row_is_text(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert read(tmp_path, f"--input={tmp_path}/x.txt") == [text]


def test_the_advice_for_archives_and_encodings_works(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("text")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "in", "in")
    assert run(tmp_path, f"--input={tmp_path}/x.tar.gz") == 2
    assert "(`tar -xf`, `python -m zipfile -e`)" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    unpack = ["tar", "-xf", "../x.tar.gz"]
    subprocess.run(unpack, cwd=tmp_path / "new", check=True)
    assert read(tmp_path, f"--input={tmp_path}/new") == ["text"]

    (tmp_path / "OLD").write_bytes("na\u00efve".encode("latin1"))
    assert run(tmp_path, f"--input={tmp_path}/OLD", "--overwrite") == 2
    error = capsys.readouterr().err
    assert "byte 2 is 0xef; convert it, as in `iconv " in error
    subprocess.run(error.split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert read(tmp_path, f"--input={tmp_path}/NEW", "--overwrite") == ["na\u00efve"]


def test_rows_without_text_are_left_out_and_counted_on_demand(tmp_path, capsys):
    bad = [
        '{"text": null}',
        '{"id": 1}',
        "[1]",
        '{"text": "a\\ud800"}',
        '{"text"',
        "\xff",
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*bad, LINES]))
    assert run(tmp_path, f"--input={path}") == 2
    assert "or give --skip_invalid_rows" in capsys.readouterr().err
    assert read(tmp_path, f"--input={path}", "--skip_invalid_rows") == TEXTS
    error = capsys.readouterr().err
    for reason in (
        "1 documents left out: no text in text",
        "2 documents left out: no field text",
        "1 documents left out: half a surrogate pair",
        "2 documents left out: not JSON",
    ):
        assert reason in error


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("place", ["x", "", "*"])
def test_what_is_no_file_is_refused_by_name(tmp_path, kind, place, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    make = {
        "pipe": os.mkfifo,
        "socket": make_socket,
        "device": lambda path: os.symlink("/dev/zero", path),
    }
    make[kind]("x")
    assert run(tmp_path, f"--input={tmp_path}/in/{place}") == 2
    assert f"in/x is a {kind}, not a file" in capsys.readouterr().err


def test_text_of_a_pipe_comes_by_standard_input(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m jaxllm.tokenize --output out --input"
    for ends in (f"{command} <(echo text)", f"{command} - <&-"):
        ended = subprocess.run(
            ["bash", "-c", ends], cwd=tmp_path, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert "pipe text into" in ended.stderr
    subprocess.run(f"echo text | {command} - --holdout 0", shell=True, cwd=tmp_path)
    assert documents(tmp_path) == ["text\n"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_links_to_folders_are_followed_and_loops_end(tmp_path, pattern, capsys):
    for folder in ("in/a", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.txt").write_text("x")
    (tmp_path / "elsewhere" / "deep" / "y.txt").write_text("y")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to(".")
    assert sorted(read(tmp_path, f"--input={tmp_path}/in/{pattern}")) == ["x", "y"]
    if not pattern:
        assert "self is a folder that is read already" in capsys.readouterr().err


def test_progress_counts_what_was_read_of_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxllm.text.progress._LINE_EVERY_S", 0.0)
    lines = [json.dumps({"text": os.urandom(500).hex()}) for _ in range(9000)]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert run(tmp_path, f"--input={path}") == 0
    shares = re.findall(r"(\d+)%", capsys.readouterr().err)
    assert [int(share) for share in shares] == sorted(map(int, shares))
    assert int(shares[0]) < 30 and shares[-1] == "100"
