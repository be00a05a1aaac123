# SPDX-License-Identifier: Apache-2.0
"""Any text becomes the same tokens: from any input, by any number of workers."""

import io
import itertools
import json
import os
import pathlib
import sys
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import models

from jaxllm import tokenize
from jaxllm.data.formats import TokenSplit, open_tokens, verify
from jaxllm.text import token_folder
from jaxllm.text.tokenizers import load_tokenizer, train_bpe

LINES = [
    f"document {i}: {'word ' * (i % 50)}fin, na\u00efve \u6c34\n" for i in range(300)
]


def run(*arguments: str) -> int:
    return tokenize.main(["tokenize", *arguments])


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def open_split(folder, name: Literal["train", "eval"] = "train") -> TokenSplit:
    split = open_tokens(str(folder), name)
    assert split is not None
    return split


def documents(folder, name: Literal["train", "eval"] = "train") -> list[str]:
    """Reads back the documents of a split, without what ends each."""
    split = open_split(folder, name)
    tokenizer = load_tokenizer(str(folder))
    assert split.document_ends is not None
    bounds = [0, *split.document_ends.tolist()]
    return [
        tokenizer.decode(split.slice(start, stop).tolist())
        for start, stop in itertools.pairwise(bounds)
    ]


def write_jsonl(path, texts, field="text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def give_stdin(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.fixture
def text(tmp_path) -> str:
    return write_jsonl(tmp_path / "text.jsonl", LINES)


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "glob", "stdin"])
def test_every_kind_of_input_gives_the_same_documents(tmp_path, out, kind, monkeypatch):
    texts = LINES[:20]
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    name = str(folder)
    if kind == "parquet":
        name = str(folder / "x.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), name)
    elif kind in ("jsonl", "stdin"):
        name = write_jsonl(folder / "x.jsonl", texts, "body")
    else:
        for i, each in enumerate(texts):
            (folder / "a" / f"{i:02d}.md").write_text(each)
        (folder / ".hidden").write_bytes(b"\xff")
    if kind == "glob":
        name += "/**/*.md"
    if kind == "stdin":
        give_stdin(monkeypatch, pathlib.Path(name).read_bytes())
        name = "-"
    flags = ["--text_field=body", "--holdout=0"]
    if kind == "stdin":
        flags.append("--stdin_format=jsonl")
    assert run(f"--input={name}", f"--output={out}", *flags) == 0
    assert documents(out) == texts


def test_a_text_file_is_one_document_unchanged_to_the_byte(tmp_path, out):
    text = "a\r\nb\n\n\tc \ufeff\u6c34<|endoftext|>"
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert run(f"--input={tmp_path / 'x.txt'}", f"--output={out}") == 0
    assert documents(out) == [text]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path, text, tokenizer, monkeypatch
):
    monkeypatch.setattr("jaxllm.text.encoding.CHUNK_BYTES", 500)
    monkeypatch.setattr("jaxllm.text.encoding.CHUNK_PIECES", 7)
    flags = [f"--input={text}", f"--tokenizer={tokenizer}", "--shard_tokens=3000"]
    for workers in (1, 2, 3):
        out = f"--output={tmp_path / str(workers)}"
        assert run(*flags, out, f"--workers={workers}", "--holdout=0.1") == 0
    assert (
        contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    )
    assert len(open_split(tmp_path / "1").shards) > 2
    verify(str(tmp_path / "1"))
    assert sorted(
        documents(tmp_path / "1") + documents(tmp_path / "1", "eval")
    ) == sorted(LINES)


def test_how_tokens_are_sharded_does_not_change_them(tmp_path, text):
    for size in (5000, 1 << 20):
        out = f"--output={tmp_path / str(size)}"
        assert run(f"--input={text}", out, f"--shard_tokens={size}") == 0
    small, large = open_split(tmp_path / "5000"), open_split(tmp_path / f"{1 << 20}")
    assert small.fingerprint == large.fingerprint
    whole = small.slice(0, small.num_tokens)
    np.testing.assert_array_equal(whole, large.slice(0, large.num_tokens))


BPE = train_bpe(LINES, 300)


def test_equal_documents_are_held_out_together(tmp_path, out):
    text = write_jsonl(tmp_path / "x.jsonl", LINES + LINES[::-1])
    assert run(f"--input={text}", f"--output={out}", "--holdout=0.2") == 0
    train, held_out = documents(out), documents(out, "eval")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 2 * len(LINES)
    assert 0.1 < len(held_out) / len(train + held_out) < 0.3


@pytest.mark.parametrize("shard_tokens", [50, 300, 10**6])
def test_the_tail_of_a_file_is_held_out_as_in_nanogpt(tmp_path, out, shard_tokens):
    text = "".join(LINES[:30])[:1003].encode("ascii", "replace")
    (tmp_path / "x.txt").write_bytes(text)
    flags = ["--holdout=0.1", "--holdout_by=tail", f"--shard_tokens={shard_tokens}"]
    assert run(f"--input={tmp_path / 'x.txt'}", f"--output={out}", *flags) == 0
    train, held_out = open_split(out), open_split(out, "eval")
    at = int(len(text) * 0.9)
    assert bytes(train.slice(0, train.num_tokens).tolist()) == text[:at]
    assert held_out.slice(0, held_out.num_tokens).tolist() == [*text[at:], 256]
    assert train.document_ends is not None and held_out.document_ends is not None
    assert train.document_ends.tolist() == [at]
    assert held_out.document_ends.tolist() == [len(text) - at + 1]
    verify(out)


@pytest.mark.parametrize("ends", ["true", "false"])
def test_the_tail_of_many_documents_continues_where_train_stops(tmp_path, text, ends):
    outs = [str(tmp_path / each) for each in ("whole", "cut")]
    flags = [
        f"--input={text}",
        f"--append_end_of_document={ends}",
        "--shard_tokens=999",
    ]
    assert run(*flags, f"--output={outs[0]}", "--holdout=0") == 0
    tail = ["--holdout=0.25", "--holdout_by=tail"]
    assert run(*flags, f"--output={outs[1]}", *tail) == 0
    parts = documents(outs[1]), documents(outs[1], "eval")
    assert "".join(parts[0] + parts[1]) == "".join(documents(outs[0]))
    num_bytes = len("".join(LINES).encode())
    assert len("".join(parts[0]).encode()) == pytest.approx(0.75 * num_bytes, abs=3)
    assert len(parts[0] + parts[1]) in (len(LINES), len(LINES) + 1)
    verify(outs[1])


def test_the_standard_library_is_a_corpus(out, capsys):
    assert run("--input=python:stdlib", f"--output={out}", "--holdout=0.05") == 0
    texts = documents(out) + documents(out, "eval")
    assert pathlib.Path(os.__file__).read_text() in texts
    assert 8e6 < sum(len(text) for text in texts) < 20e6
    assert len(texts) > 400
    assert "train: " in capsys.readouterr().out


@pytest.mark.parametrize("size, width", [(2**16 - 1, 2), (2**16, 4)])
def test_tokens_take_four_bytes_where_two_are_not_enough(
    tmp_path, text, out, size, width
):
    words = {f"w{i}": i for i in range(size)} | {"<eos>": size}
    backend = tokenizers.Tokenizer(models.WordLevel(words, "w0"))
    backend.save(str(tmp_path / "t.json"))
    assert (
        run(f"--input={text}", f"--output={out}", f"--tokenizer={tmp_path}/t.json") == 0
    )
    assert {shard.dtype.itemsize for shard in open_split(out).shards} == {width}
    assert size in open_split(out).slice(0, 2)


def test_a_tokenizer_is_trained_on_a_bounded_sample_without_what_is_held_out(
    tmp_path, out, monkeypatch
):
    texts = [f"{i} {line}" for i in range(20) for line in LINES]
    text = write_jsonl(tmp_path / "x.jsonl", texts)
    trained_on = []

    def train(texts, vocab_size):
        trained_on.extend(texts)
        return BPE

    monkeypatch.setattr(token_folder, "train_bpe", train)
    monkeypatch.setattr(token_folder, "TRAINING_BYTES", 200_000)
    flags = [f"--input={text}", f"--output={out}", "--holdout=0.2"]
    assert run(*flags, "--tokenizer=bpe:300") == 0
    assert 50_000 < sum(len(text.encode()) for text in trained_on) < 220_000
    assert set(trained_on) <= set(documents(out))
