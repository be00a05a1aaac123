# SPDX-License-Identifier: Apache-2.0
"""Streamed text is the decoded text, whatever the decoder and wherever tokens end."""

import functools

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxllm.text.decoding import TextStream
from jaxllm.text.tokenizers import BytesTokenizer, HFTokenizer, train_bpe

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA = decoders.Sequence(
    [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
GEMMA = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
)


def make(decoder, words: str, extra: list[str] | None = None) -> HFTokenizer:
    """Makes a tokenizer of some words, each a token, and two special tokens."""
    names = ["<unk>", *dict.fromkeys(words.split()), *(extra or [])]
    vocab = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["\u6c34<added>"])
    return HFTokenizer(backend.to_str().encode(), None)


PIECES = (
    "\u2581 \u2581\u2581 a \u2581a b \u2581b \u6c34 . \u2581. n't \ufffd \u2581\u2581c"
)
SUBWORDS = "a ##a b ##b . , n't 's do ##. ! \ufffd \u6c34 ##\u6c34"
WORD_ENDS = "a a</w> b b</w> a</w>b </w> </w>a </w></w> \u6c34</w> \ufffd"
DECODERS = {
    "llama": make(LLAMA, PIECES, BYTES),
    "gemma": make(GEMMA, PIECES, BYTES),
    "metaspace": make(decoders.Metaspace(), PIECES),
    "metaspace, never": make(decoders.Metaspace(prepend_scheme="never"), PIECES),
    "wordpiece": make(decoders.WordPiece(cleanup=False), SUBWORDS),
    "wordpiece, cleanup": make(decoders.WordPiece(cleanup=True), SUBWORDS),
    "bpe": make(decoders.BPEDecoder("</w>"), WORD_ENDS),
    "ctc": make(decoders.CTC(), "<pad> | a b . \u6c34 n't"),
    "none": make(None, PIECES),
    "strip two": make(
        decoders.Sequence([GEMMA, decoders.Strip(" ", 2, 0)]), PIECES, BYTES
    ),
    "strip the end": make(
        decoders.Sequence([GEMMA, decoders.Strip(" ", 0, 1)]), PIECES, BYTES
    ),
    "replace in the whole": make(
        decoders.Sequence([GEMMA, decoders.Replace("a b", "xyz")]), PIECES, BYTES
    ),
    "bpe, replaced": make(
        decoders.Sequence([decoders.BPEDecoder("</w>"), decoders.Replace(" ", "_")]),
        WORD_ENDS,
    ),
}
NOT_STREAMED = {"strip the end", "replace in the whole", "bpe, replaced"}
TRAINED_ON = "der Fluss flie\u00dft, \u6c34 \u6c34 flie\u00dft"
TRAINED = train_bpe([TRAINED_ON] * 9, 270)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LEVELS = {"bytes": BytesTokenizer(), "byte level": TRAINED}


def streamed(tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(each) for each in ids]
    return "".join(pieces) + stream.flush()


def added(tokenizer, prompt: list[int], ids: list[int]) -> str:
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@functools.cache
def interesting_ids(name: str) -> list[int]:
    """Returns tokens of which any order is worth trying: few of them are bytes."""
    tokenizer = {**DECODERS, **LEVELS}[name]
    if name in LEVELS:
        some = "a .\n\ufffd\u6c34\U0001f600\u00df".encode() + b"\xc0\xff"
        ids = list(some) if name == "bytes" else tokenizer.encode(TRAINED_ON)
        if name == "byte level":  # parts of characters: each byte by itself
            alphabet = BYTE_LEVEL.pre_tokenize_str(some.decode(errors="ignore"))
            names = "".join(name for name, _ in alphabet)
            ids += [tokenizer.backend.token_to_id(name) for name in names]
        return [*ids, tokenizer.end_of_document, tokenizer.vocab_size + 7]
    vocab = tokenizer.backend.get_vocab()
    some = [f"<0x{byte:02X}>" for byte in "\u6c34a ".encode()] + ["<0xF0>", "<0xFF>"]
    kept = [name for name in vocab if name not in BYTES or name in some]
    return [*sorted(vocab[name] for name in kept), tokenizer.vocab_size + 7]


@pytest.mark.parametrize("name", [*DECODERS, *LEVELS])
@given(data=st.data())
def test_streamed_pieces_and_the_flush_are_the_decoded_text(name, data):
    tokenizer = {**DECODERS, **LEVELS}[name]
    lists = st.lists(st.sampled_from(interesting_ids(name)), max_size=12)
    prompt, ids = data.draw(lists), data.draw(lists)
    assert streamed(tokenizer, prompt, ids) == added(tokenizer, prompt, ids)


@pytest.mark.parametrize("name", LEVELS)
@given(text=st.text(st.characters(codec="utf-8")), at=st.integers(0, 30))
@example(text="\ufeff\ufffd\U0001f600\u6c34\u6c34", at=4)
def test_a_text_is_streamed_in_whole_characters(name, text, at):
    tokenizer = LEVELS[name]
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, [], ids) == text
    assert streamed(tokenizer, ids[:at], ids[at:]) == added(
        tokenizer, ids[:at], ids[at:]
    )
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(each) for each in ids]
    assert text.startswith("".join(pieces))


@pytest.mark.parametrize("name", [*DECODERS, *LEVELS])
def test_text_is_shown_at_the_next_token_unless_the_decoder_forbids_it(name):
    tokenizer = {**DECODERS, **LEVELS}[name]
    a, b = (
        (tokenizer.backend.token_to_id(each) for each in "ab")
        if (name not in LEVELS)
        else (tokenizer.encode(each)[0] for each in "ab")
    )
    stream = TextStream(tokenizer, [a])
    pieces = [stream.add(each) for each in (b, a, b)]
    assert all(pieces) == (name not in NOT_STREAMED)


def test_a_long_text_is_decoded_a_window_at_a_time(monkeypatch):
    longest = 0
    decode = BytesTokenizer.decode

    def counted(self, ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids)

    monkeypatch.setattr(BytesTokenizer, "decode", counted)
    text = "der Fluss flie\u00dft, \u6c34 " * 500
    assert streamed(BytesTokenizer(), [], list(text.encode())) == text
    assert longest < 12
