# SPDX-License-Identifier: Apache-2.0
"""A long document has the tokens of the whole, whatever the tokenizer's rules."""

import collections
import functools
import io

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from jaxllm.text import borders, documents
from jaxllm.text.documents import Piece, Reading
from jaxllm.text.encoding import encode_pieces
from jaxllm.text.tokenizers import BytesTokenizer, HFTokenizer

LINES = [
    f"def f{i}(a, b):  # it's line {i}, na\u00efve \u6c34\u304c\u6d41\u308c\u308b\u3002"
    f"\n    return '{i * 7919}' + \"x y\"\n\n"
    + "word " * (i % 5)
    + "\u6c34"
    + ("\n", "\r\n")[i % 2]
    for i in range(40)
]
# Of GPT-4 and, with small differences, of Llama 3 and Qwen.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]
    )


def fixed_length():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.FixedLength(5), byte_level])


LLAMA = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
)
XLMR = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
)
T5 = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
)
RULES = {  # model, normalizer, pre-tokenizer
    "gpt2": ("BPE", None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "add_prefix_space": ("BPE", None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt4": ("BPE", normalizers.NFC(), split(GPT4)),
    "bert": (
        "WordPiece",
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "metaspace": ("Unigram", None, pre_tokenizers.Metaspace()),
    "metaspace, first": (
        "Unigram",
        None,
        pre_tokenizers.Metaspace(prepend_scheme="first"),
    ),
    "t5": ("Unigram", normalizers.NFKC(), T5),
    "xlm-r": ("Unigram", XLMR, pre_tokenizers.Metaspace()),
    "strip": ("WordPiece", normalizers.Strip(), pre_tokenizers.Whitespace()),
    "llama": ("BPE", LLAMA, None),
    "quotes": ("BPE", None, split('"[^"]*"')),
    "fixed length": ("BPE", None, fixed_length()),
}
TRAINERS = {
    "BPE": trainers.BpeTrainer,
    "WordPiece": trainers.WordPieceTrainer,
    "Unigram": trainers.UnigramTrainer,
}
KEPT_WHOLE = {"quotes", "fixed length"}


@functools.cache
def trained(name: str) -> HFTokenizer:
    kind, normalizer, pre_tokenizer = RULES[name]
    has_unknown = kind != "BPE" or name == "llama"
    arguments = {"unk_token": "<unk>"} if has_unknown and kind != "Unigram" else {}
    backend = tokenizers.Tokenizer(getattr(models, kind)(**arguments))
    if normalizer is not None:
        backend.normalizer = normalizer
    # Llama's BPE sees whole documents; its vocabulary was made of words.
    words = pre_tokenizers.Split("\u2581", "merged_with_next")
    backend.pre_tokenizer = pre_tokenizer or words
    trainer = TRAINERS[kind](
        vocab_size=400,
        special_tokens=["<unk>"],
        show_progress=False,
        **({"unk_token": "<unk>"} if kind == "Unigram" else {}),
    )
    backend.train_from_iterator(LINES, trainer)
    if pre_tokenizer is None:
        backend.pre_tokenizer = None
    return HFTokenizer(backend.to_str().encode(), None)


def cut(text: str, tokenizer, size: int) -> list[Piece]:
    skipped = collections.Counter()
    cutter = borders.make_cutter(tokenizer)
    reading = Reading("text", False, skipped, cutter.cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", size)
        return list(documents._cut(b"", io.BytesIO(text.encode()).read, reading))


def encode(pieces, tokenizer) -> list[int]:
    encoded = encode_pieces(pieces, tokenizer, append_end=False, workers=1)
    return [token for each in encoded for token in each.tokens.tolist()]


@pytest.mark.parametrize("name", RULES)
def test_the_tokens_of_pieces_are_those_of_the_whole(name):
    tokenizer = trained(name)
    text = "".join(LINES) + " ".join(LINES).replace("\r\n", "\n")
    whole = tokenizer.encode(text)
    for size in (200, 1000):
        pieces = cut(text, tokenizer, size)
        assert b"".join(piece.text for piece in pieces).decode() == text
        assert encode(pieces, tokenizer) == whole
        if name in KEPT_WHOLE:
            assert len(pieces) == 1
        else:
            assert len(pieces) > len(text) / size / 3


WORDS = [
    "ab",
    "c",
    ".",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\u6c34",
    "1",
    '"',
    "'s",
    "\u0301",
]


@pytest.mark.parametrize("name", RULES)
@given(
    text=st.lists(st.sampled_from(WORDS), min_size=1).map("".join),
    size=st.integers(4, 30),
)
def test_odd_texts_too(name, text, size):
    tokenizer = trained(name)
    assert encode(cut(text, tokenizer, size), tokenizer) == tokenizer.encode(text)


@given(
    text=st.lists(st.sampled_from(WORDS), min_size=1).map("".join),
    size=st.integers(4, 30),
)
def test_bytes_are_cut_between_any_characters(text, size):
    pieces = cut(text, BytesTokenizer(), size)
    assert b"".join(piece.text for piece in pieces).decode() == text
    assert all(piece.text.decode() for piece in pieces)
    assert all(len(piece.text) <= size + 3 for piece in pieces)
    assert [piece.is_first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len({piece.document_hash for piece in pieces}) == 1


def test_a_word_with_a_space_is_not_cut():
    backend = tokenizers.Tokenizer(
        models.BPE(
            {"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")]
        )
    )
    tokenizer = HFTokenizer(backend.to_str().encode(), None)
    text = "a b" * 40 + "b b" * 40
    assert encode(cut(text, tokenizer, 30), tokenizer) == tokenizer.encode(text)


def test_a_large_document_that_stays_whole_is_said(capsys, monkeypatch):
    monkeypatch.setattr(documents, "_LARGE_BYTES", 500)
    assert len(cut("a" * 2000, trained("gpt2"), 100)) == 1
    assert capsys.readouterr().err.count("is tokenized as a whole") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt4", "metaspace", "llama", "quotes"])
def test_documents_of_some_mebibytes_have_the_tokens_of_the_whole(name):
    tokenizer = trained(name)
    text = "".join(LINES) * 600
    pieces = cut(text, tokenizer, documents.PIECE_BYTES)
    assert (len(pieces) == 3) == (name not in KEPT_WHOLE)
    assert encode(pieces, tokenizer) == tokenizer.encode(text)
