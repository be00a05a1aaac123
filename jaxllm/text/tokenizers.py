# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: UTF-8 bytes, a Hugging Face tokenizer.json, or a BPE trained on a text.

A special token spelled out in a text, such as `<|endoftext|>`, becomes ordinary tokens.
The only special token that this package adds is the end of a document.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.data.manifest import (
    MANIFEST,
    TOKENIZER,
    TokenizerEntry,
    read_manifest,
)
from jaxllm.errors import InputError
from jaxllm.text.sources import check_regular

END_OF_DOCUMENT = "<|endoftext|>"  # of a BPE trained here
MAX_TRAINED_VOCAB = 1_000_000
MAX_ID = 2**31 - 1

# Names in published tokenizers; the first one found is used.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")


@dataclasses.dataclass(frozen=True)
class BytesTokenizer:
    """One token per byte of UTF-8; 256 ends a document."""

    kind: Literal["bytes"] = "bytes"
    vocab_size: int = 257
    end_of_document: int = 256
    sha256: str = hashlib.sha256(b"jaxllm bytes, 256 ends a document").hexdigest()

    @property
    def ids(self) -> range:
        return range(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without an end of document."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens; what is not UTF-8 shows as U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`."""

    json: bytes = dataclasses.field(repr=False)  # the file, unchanged
    end_of_document: int | None
    kind: Literal["hf"] = "hf"

    def __reduce__(self):
        return HFTokenizer, (self.json, self.end_of_document)

    @functools.cached_property
    def backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.json.decode())
        backend.encode_special_tokens = True  # as text, not as their ids
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # equal texts have equal tokens
        backend.no_truncation()
        backend.no_padding()
        return backend

    @functools.cached_property
    def vocab_size(self) -> int:
        # Ids may have holes, and added tokens may lie beyond the model's vocabulary.
        return max(self.ids) + 1

    @property
    def ids(self) -> list[int]:
        return list(self.backend.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.json).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without an end of document."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text."""
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    @functools.cached_property
    def unknown_token(self) -> int | None:
        """The token of what no other one holds."""
        model = json.loads(self.json)["model"]
        if (unknown := model.get("unk_id")) is not None:
            return unknown
        return self.backend.token_to_id(model.get("unk_token") or "")

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, without special tokens."""
        ids = list(ids)
        if all(self.shown_token(each) is None for each in ids):
            return ""  # the library's BPEDecoder panics without a token
        return self.backend.decode(ids, skip_special_tokens=True)

    def shown_token(self, token_id: int) -> str | None:
        """Returns a token as in the vocabulary; None for one that has no text."""
        token = self.backend.id_to_token(token_id)
        return None if token in self._special_tokens else token

    @functools.cached_property
    def _special_tokens(self) -> set[str]:
        added = self.backend.get_added_tokens_decoder().values()
        return {token.content for token in added if token.special}


Tokenizer = BytesTokenizer | HFTokenizer


def load_tokenizer(path: str, *, end_of_document: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a token folder, a tokenizer.json, or `bytes`.

    Args:
      path: a token folder, whose manifest names its end of document, or a file.
      end_of_document: the token that ends a document, for a tokenizer.json where it has
        none of the usual names; without one, `Tokenizer.end_of_document` is None.
    """
    if path == "bytes":
        _refuse_end(end_of_document, path)
        return BytesTokenizer()
    if not os.path.isdir(path):
        return _load_json(path, end_of_document)
    if not os.path.exists(os.path.join(path, MANIFEST)):
        return _load_json(os.path.join(path, TOKENIZER), end_of_document)
    entry = read_manifest(path).tokenizer
    if entry.kind == "bytes":
        _refuse_end(end_of_document, f"{path}, which is bytes")
        tokenizer = BytesTokenizer()
    else:
        tokenizer = _load_json(os.path.join(path, TOKENIZER), end_of_document)
        if end_of_document is None:
            end = entry.end_of_document
            tokenizer = dataclasses.replace(tokenizer, end_of_document=end)
    if tokenizer.sha256 != entry.sha256:
        raise InputError(
            f"{os.path.join(path, TOKENIZER)} has changed since the tokens were made; "
            "copy the folder again, or make it again with `python -m jaxllm.tokenize`."
        )
    return tokenizer


def trained_vocab_size(name: str) -> int | None:
    """Returns the size in `bpe:SIZE`, checked; None for a tokenizer that exists."""
    if not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe:")
    least = 256 + 1  # every byte, and the end of document
    if not size.isdecimal() or not least <= int(size) <= MAX_TRAINED_VOCAB:
        raise InputError(
            f"--tokenizer={name} must be bpe: and a size of the vocabulary from "
            f"{least} to {MAX_TRAINED_VOCAB}; bpe:4096 suits small models, bpe:32768 "
            "large ones."
        )
    return int(size)


def check_trained_end(name: str, end_of_document: str | None):
    """Refuses another end of document than the one of a tokenizer trained here."""
    if trained_vocab_size(name) and end_of_document != END_OF_DOCUMENT:
        _refuse_end(end_of_document, name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Trains a byte-level BPE; deterministic for the same texts in the same order.

    Source: GPT-2's pre-tokenization (Radford et al., 2019). Any text can be encoded.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=alphabet,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found < vocab_size:
        raise InputError(
            f"--tokenizer=bpe:{vocab_size} needs more text: the input gives only "
            f"{found} tokens that occur twice; use bpe:{found} or less, or bytes."
        )
    content = backend.to_str().encode()
    return HFTokenizer(content, backend.token_to_id(END_OF_DOCUMENT))


def describe_tokenizer(tokenizer: Tokenizer) -> TokenizerEntry:
    """Returns the entry of a tokenizer in a manifest."""
    names = [field.name for field in dataclasses.fields(TokenizerEntry)]
    return TokenizerEntry(**{name: getattr(tokenizer, name) for name in names})


def _refuse_end(end_of_document: str | None, tokenizer: str):
    if end_of_document is not None:
        raise InputError(
            f"--end_of_document={end_of_document} names a token of a tokenizer.json, "
            f"but --tokenizer={tokenizer} has its own end of a document; leave it out."
        )


def _load_json(path: str, end_of_document: str | None) -> HFTokenizer:
    try:
        check_regular(f"--tokenizer={path}", os.stat(path).st_mode)
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise InputError(
            f"tokenizer {path} cannot be read: {error.strerror}; give `bytes`, the "
            "path of a tokenizer.json or, to train one, `bpe:4096`."
        ) from error
    tokenizer = HFTokenizer(content, None)
    try:
        vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing more precise
        raise InputError(
            f"tokenizer {path} is not a tokenizer.json of Hugging Face's `tokenizers`: "
            f"{error}."
        ) from error
    if not vocab:
        raise InputError(f"tokenizer {path} has an empty vocabulary; give another.")
    _check_ids(path, vocab)
    if end_of_document is not None and end_of_document not in vocab:
        raise InputError(
            f"--end_of_document={end_of_document} is not a token of {path}; give one "
            f"of its special tokens: {_list_added_tokens(tokenizer)}."
        )
    names = _KNOWN_ENDS if end_of_document is None else (end_of_document,)
    ends = [vocab[name] for name in names if name in vocab]
    return dataclasses.replace(tokenizer, end_of_document=ends[0] if ends else None)


def _check_ids(path: str, vocab: dict[str, int]):
    largest = max(vocab, key=vocab.__getitem__)
    if vocab[largest] >= MAX_ID:
        raise InputError(
            f"tokenizer {path} has the id {vocab[largest]} for {largest!r}; ids are "
            f"signed numbers of 32 bits, below {MAX_ID}: correct the file."
        )
    names = {}
    for name, token_id in vocab.items():
        if (other := names.setdefault(token_id, name)) != name:
            raise InputError(
                f"tokenizer {path} has the id {token_id} for both {other!r} and "
                f"{name!r}, and could not give the text back; correct the file."
            )


def _list_added_tokens(tokenizer: HFTokenizer) -> str:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return ", ".join(token.content for token in list(added)[:16]) or "it has none"
