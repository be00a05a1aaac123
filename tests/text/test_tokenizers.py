# SPDX-License-Identifier: Apache-2.0
"""Tokenizers give back every text, and training one is reproducible."""

import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxllm import tokenize
from jaxllm.errors import InputError
from jaxllm.text.tokenizers import (
    BytesTokenizer,
    HFTokenizer,
    load_tokenizer,
    train_bpe,
    trained_vocab_size,
)

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "der Fluss fließt, 水が流れる",
    "1234 " * 9,
]
BPE = train_bpe(TEXTS * 20, 290)
TOKENIZERS = [BytesTokenizer(), BPE]


def write_tokenizer(path, *special_tokens: str) -> str:
    """Writes a tokenizer.json of a few words."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special_tokens))
    backend.save(str(path))
    return str(path)


@given(st.text(st.characters(codec="utf-8")))
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda each: each.kind)
def test_every_text_comes_back_from_its_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda each: each.kind)
def test_an_end_of_document_in_a_text_is_text(tokenizer):
    text = "a<|endoftext|>b"
    assert tokenizer.end_of_document not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_document_decodes_to_nothing():
    for tokenizer in TOKENIZERS:
        assert tokenizer.end_of_document is not None
        ids = [*tokenizer.encode("a"), tokenizer.end_of_document]
        assert tokenizer.decode(ids) == "a"


def test_training_gives_the_same_tokenizer_in_every_process():
    program = f"""
from jaxllm.text.tokenizers import train_bpe
print(train_bpe({TEXTS!r} * 20, 290).sha256)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == BPE.sha256


def test_a_trained_tokenizer_has_exactly_the_size_that_was_asked_for():
    assert BPE.vocab_size == 290
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0])


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(InputError, match="--tokenizer=bpe:5000 needs more text"):
        train_bpe(TEXTS, 5000)


@pytest.mark.parametrize("size", ["", "x", "-300", "256", "10000000"])
def test_a_size_that_no_vocabulary_can_have_is_refused(size):
    with pytest.raises(InputError, match=f"--tokenizer=bpe:{size} must be bpe: and"):
        trained_vocab_size(f"bpe:{size}")


def test_a_tokenizer_file_is_read_and_known_by_its_hash(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(BPE.json)
    loaded = load_tokenizer(str(path))
    assert loaded == BPE == load_tokenizer(str(tmp_path))
    assert loaded.sha256 == hashlib.sha256(BPE.json).hexdigest()
    assert load_tokenizer("bytes") == BytesTokenizer()


def test_a_tokenizer_can_be_sent_to_another_process():
    copy = pickle.loads(pickle.dumps(BPE))
    text = "a<|endoftext|>b"
    assert copy.encode(text) == BPE.encode(text)


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_the_usual_ends_of_documents_are_found(tmp_path, name):
    path = write_tokenizer(tmp_path / "tokenizer.json", "<pad>", name)
    assert load_tokenizer(path).end_of_document == 4


def test_the_end_of_document_can_be_named(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", "<stop>", "</s>")
    assert load_tokenizer(path, end_of_document="<stop>").end_of_document == 3
    with pytest.raises(InputError, match=r"--end_of_document=<end> .* <stop>, </s>"):
        load_tokenizer(path, end_of_document="<end>")
    assert load_tokenizer(write_tokenizer(tmp_path / "x.json")).end_of_document is None


def test_a_token_folder_keeps_its_end_of_document_or_takes_another(tmp_path):
    path = write_tokenizer(tmp_path / "t.json", "<stop>", "</s>")
    (tmp_path / "x.txt").write_text("a b")
    flags = [f"--input={tmp_path}/x.txt", f"--tokenizer={path}", "--holdout=0"]
    out = str(tmp_path / "out")
    ends = ["--end_of_document=<stop>", f"--output={out}"]
    assert tokenize.main(["tokenize", *flags, *ends]) == 0
    assert load_tokenizer(out).end_of_document == 3
    assert load_tokenizer(out, end_of_document="</s>").end_of_document == 4


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"b": 1', '"b": 0', "has the id 0 for both"),
        ('"b": 1', f'"b": {2**32 - 1}', f"has the id {2**32 - 1} for 'b'"),
        ('"b": 1', f'"b": {2**31 - 1}', "ids are signed numbers of 32 bits"),
    ],
)
def test_ids_that_cannot_stand_for_a_token_each_are_refused(
    tmp_path, old, new, message
):
    path = pathlib.Path(write_tokenizer(tmp_path / "t.json"))
    text = json.dumps(json.loads(path.read_text()))
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(path))


def test_a_tokenizer_that_drops_merges_at_random_always_makes_the_same_tokens():
    backend = tokenizers.Tokenizer(
        models.BPE({"a": 0, "aa": 1}, [("a", "a")], dropout=0.9)
    )
    tokenizer = HFTokenizer(backend.to_str().encode(), None)
    assert '"dropout": 0.9' in json.dumps(json.loads(tokenizer.json))
    assert tokenizer.encode("a" * 40) == [1] * 20


def test_no_tokens_are_no_text_for_every_decoder():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    backend.decoder = decoders.BPEDecoder()
    tokenizer = HFTokenizer(backend.to_str().encode(), None)
    assert tokenizer.decode([]) == tokenizer.decode([7]) == ""


def test_a_pipe_is_refused_as_a_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "t.json")
    with pytest.raises(InputError, match=r"--tokenizer=.*t\.json is a pipe"):
        load_tokenizer(str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"\xff", b"[1]", b'{"model": 3}']
)
def test_what_is_no_tokenizer_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer .*mine\.json"):
        load_tokenizer(str(path))
