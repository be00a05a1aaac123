# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with the input: one message, exit status 2, nothing changed."""

import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm import tokenize
from jaxllm.text.tokenizers import train_bpe

LINES = [f"document {i}: {'word ' * (i % 50)}fin\n" for i in range(300)]
BPE = train_bpe(LINES, 290)


def run(*arguments: str) -> int:
    return tokenize.main(["tokenize", *arguments])


def write_jsonl(path, texts, field="text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def text(tmp_path) -> str:
    return write_jsonl(tmp_path / "text.jsonl", LINES)


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "out")


def make_foreign(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


WRONG = {
    "no input": ((), None, "--input is missing"),
    "missing file": (
        ("--input=DIR/no.txt",),
        None,
        "--input=DIR/no.txt does not exist",
    ),
    "empty glob": (("--input=DIR/*.no",), None, "--input=DIR/*.no does not exist"),
    "empty folder": (
        ("--input=DIR/empty",),
        lambda folder: (folder / "empty").mkdir(),
        "--input=DIR/empty holds no files",
    ),
    "empty file": (("--input=DIR/x.txt",), write("x.txt", b""), "holds no text"),
    "not UTF-8": (
        ("--input=DIR/x.txt",),
        write("x.txt", b"abc\xff"),
        "--input=DIR/x.txt is not UTF-8 text: byte 3 is 0xff",
    ),
    "not compressed": (
        ("--input=DIR/x.gz",),
        write("x.gz", b"1"),
        "--input=DIR/x.gz cannot be read as gzip",
    ),
    "compressed otherwise": (
        ("--input=DIR/x.lz4",),
        write("x.lz4", b"1"),
        "is compressed in a way that is not read",
    ),
    "compressed Parquet": (
        ("--input=DIR/x.parquet.gz",),
        write("x.parquet.gz", b"1"),
        "is compressed in a way that is not read",
    ),
    "archive": (
        ("--input=DIR/x.tar.gz",),
        write("x.tar.gz", b"1"),
        "--input=DIR/x.tar.gz is an archive",
    ),
    "not an array": (
        ("--input=DIR/x.json",),
        write("x.json", b'[{"text": "a"}, {"text": "b"} {"text": "c"}]'),
        "--input=DIR/x.json is not a JSON array: , or ] expected, not {",
    ),
    "no rows": (
        ("--input=DIR/x.json",),
        write("x.json", b'{\n "name": "x"\n}'),
        "x.json:1 is not a line of JSON",
    ),
    "twice": (("OK", "OK"), None, "ok.jsonl is given twice; give each file once"),
    "twice by a link": (
        ("OK", "--input=DIR/link.jsonl"),
        lambda folder: (folder / "link.jsonl").symlink_to("ok.jsonl"),
        "--input=DIR/link.jsonl is given twice, also as DIR/ok.jsonl",
    ),
    "broken link": (
        ("--input=DIR/link*",),
        lambda folder: (folder / "link").symlink_to("gone"),
        "--input=DIR/link cannot be read: No such file",
    ),
    "no standard input": (
        ("OK", "--stdin_format=jsonl"),
        None,
        "--stdin_format=jsonl is for --input=-, which is not given",
    ),
    "end of bytes": (
        ("OK", "--end_of_document=</s>"),
        None,
        "--end_of_document=</s> names a token of a tokenizer.json, but",
    ),
    "end of a BPE": (
        ("OK", "--tokenizer=bpe:257", "--end_of_document=</s>"),
        None,
        "but --tokenizer=bpe:257 has its own end",
    ),
    "too many files": (
        ("OK", "--shard_tokens=1"),
        lambda _: None,
        "--shard_tokens=1 makes more than 100 files",
    ),
    "too many workers": (("OK", "--workers=100000"), None, "must be from 0, which is"),
    "no share": (("OK", "--max_lost=2"), None, "--max_lost=2.0 must be from 0 to 1"),
    "no number": (("OK", "--holdout=nan"), None, "--holdout=nan must be at least 0"),
    "not JSON": (
        ("--input=DIR/x.jsonl",),
        write("x.jsonl", b'{"text": "a"}\n\n{"text"\n'),
        "--input=DIR/x.jsonl:3 is not a line of JSON",
    ),
    "not an object": (
        ("--input=DIR/x.jsonl",),
        write("x.jsonl", b"[1]"),
        "--input=DIR/x.jsonl:1 has no --text_field=text; it has no fields",
    ),
    "no such field": (
        ("--input=DIR/x.jsonl", "--text_field=body"),
        write("x.jsonl", b'{"text": "a"}'),
        "x.jsonl:1 has no --text_field=body; it has text",
    ),
    "not text": (
        ("--input=DIR/x.jsonl",),
        write("x.jsonl", b'{"text": null}'),
        "x.jsonl:1 has a NoneType in --text_field=text",
    ),
    "half a character": (
        ("--input=DIR/x.jsonl",),
        write("x.jsonl", b'{"text": "a\\ud800"}'),
        "half a surrogate pair at character 1",
    ),
    "no parquet": (
        ("--input=DIR/x.parquet",),
        write("x.parquet", b"PAR1 or not"),
        "x.parquet is not a readable parquet file",
    ),
    "no such column": (
        ("--input=DIR/x.parquet",),
        lambda folder: pyarrow.parquet.write_table(
            pyarrow.table({"body": ["a"]}), folder / "x.parquet"
        ),
        "x.parquet has no --text_field=text; it has body",
    ),
    "stdin twice": (("--input=-", "--input=-"), None, "--input=- is given twice"),
    "stdin is read once": (
        ("--input=-", "--tokenizer=bpe:300"),
        None,
        "--tokenizer=bpe:300 reads its text twice",
    ),
    "unknown tokenizer": (("OK", "--tokenizer=gpt2"), None, "tokenizer gpt2 cannot be"),
    "no size": (
        ("OK", "--tokenizer=bpe:x"),
        None,
        "--tokenizer=bpe:x must be bpe: and",
    ),
    "vocabulary too small": (
        ("OK", "--tokenizer=bpe:9"),
        None,
        "a size of the vocabulary from 257",
    ),
    "vocabulary too large": (("OK", "--tokenizer=bpe:9999"), None, "needs more text"),
    "no end of document": (
        ("OK", "--tokenizer=DIR/t.json"),
        write("t.json", BPE.json.replace(b"<|endoftext|>", b"<|fin|>")),
        "t.json has no token of a usual name to end a document",
    ),
    "unknown end of document": (
        ("OK", "--tokenizer=DIR/t.json", "--end_of_document=</s>"),
        write("t.json", BPE.json),
        "--end_of_document=</s> is not a token of",
    ),
    "all held out": (("OK", "--holdout=1.0"), None, "--holdout=1.0 must be at least 0"),
    "nothing to train on": (
        ("--input=DIR/x.jsonl", "--holdout=0.999999999"),
        write("x.jsonl", b'{"text": "a"}'),
        "leaves no text to train on",
    ),
    "no tokens a file": (("OK", "--shard_tokens=0"), None, "--shard_tokens=0 must be"),
    "negative workers": (("OK", "--workers=-1"), None, "--workers=-1 must be"),
    "unknown flag": (("OK", "--tokeniser=bytes"), None, "did you mean --tokenizer?"),
    "no flag": (("OK", "x.txt"), None, "'x.txt' is not a flag"),
    "wrong type": (("OK", "--holdout=some"), None, "--holdout"),
    "wrong choice": (("OK", "--holdout_by=luck"), None, "--holdout_by"),
    "no output": (("OK", "--output="), None, "--output"),
    "output is a file": (("OK",), write("out", b"mine"), "is a file"),
    "output is another's": (("OK", "--overwrite"), make_foreign, "such as thesis.tex"),
    "output is below a file": (
        ("OK", "--output=DIR/f/out"),
        write("f", b"mine"),
        "--output=DIR/f/out cannot be written",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_and_changes_nothing(
    tmp_path, case, capsys, monkeypatch
):
    monkeypatch.setattr("jaxllm.text.shards._MAX_SHARDS", 100)
    flags, prepare, message = WRONG[case]
    ok = write_jsonl(tmp_path / "ok.jsonl", LINES[:9])
    if prepare is not None:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    place = str(tmp_path)
    replaced = [flag.replace("DIR", place) for flag in flags]
    replaced = [f"--input={ok}" if flag == "OK" else flag for flag in replaced]
    assert run(f"--output={tmp_path / 'out'}", *replaced) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.replace("DIR", place) in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written_is_refused(tmp_path, text, out, capsys):
    os.chmod(text, 0)
    assert run(f"--input={text}", f"--output={out}") == 2
    assert (
        f"--input={text} cannot be read: Permission denied" in capsys.readouterr().err
    )
    os.chmod(text, 0o600)
    os.chmod(tmp_path, 0o500)
    assert run(f"--input={text}", f"--output={out}") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path, out, capsys, monkeypatch
):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert run(f"--input={tmp_path / 'x.parquet'}", f"--output={out}") == 2
    assert "pip install jaxllm[parquet]" in capsys.readouterr().err
