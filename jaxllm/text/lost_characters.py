# SPDX-License-Identifier: Apache-2.0
"""Counts the characters of a text that its tokens do not hold.

A model without an unknown token drops what its vocabulary lacks (BPE) or cannot encode
it (the others); with one, all that is unknown looks the same. What a normalizer or a
pre-tokenizer removes on purpose, such as accents or spaces, is not lost.
"""

import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence

from tokenizers import pre_tokenizers

from jaxllm.errors import InputError
from jaxllm.text.tokenizers import HFTokenizer


@dataclasses.dataclass
class Lost:
    """Numbers of characters."""

    total: int = 0  # of the text
    unknown: int = 0  # within unknown tokens
    vanished: collections.Counter[str] = dataclasses.field(  # without any token
        default_factory=collections.Counter
    )

    def add(self, other: "Lost"):
        """Adds those of another text."""
        self.total += other.total
        self.unknown += other.unknown
        self.vanished += other.vanished

    def name_vanished(self) -> str:
        """Returns the most frequent characters that have no token."""
        return ", ".join(
            f"{each!r} (U+{ord(each):04X})" for each, _ in self.vanished.most_common(3)
        )


class Losses:
    """Sums what a tokenizer loses of a text, and says it."""

    def __init__(self, tokenizer: str, max_lost: float):
        self._tokenizer, self._max_lost = tokenizer, max_lost
        self._lost = Lost()

    def add(self, lost: Lost):
        """Adds a part of the text; refuses any loss at once where none is allowed."""
        self._lost.add(lost)
        if not self._max_lost and self._lost.vanished:
            raise self._refusal("of the text so far")

    def check(self):
        """Refuses a loss above the limit, and says any other, at the end of a text."""
        total, unknown = self._lost.total, self._lost.unknown
        vanished = self._lost.vanished
        if vanished.total() > self._max_lost * total:
            raise self._refusal("of the text")
        for number, what in ((unknown, "unknown to"), (vanished.total(), "dropped by")):
            if number:
                print(
                    f"warning: {number:,} of {total:,} characters "
                    f"({number / total:.2%}) are {what} --tokenizer={self._tokenizer}.",
                    file=sys.stderr,
                )

    def _refusal(self, of_what: str) -> InputError:
        vanished = self._lost.vanished
        share = vanished.total() / self._lost.total
        return InputError(
            f"--tokenizer={self._tokenizer} has no token for "
            f"{self._lost.name_vanished()}, nor an unknown token: {share:.2%} of the "
            f"characters {of_what} would vanish. Give a tokenizer of all bytes, or "
            "allow it, as in "
            f"--max_lost={max(float(f'{2 * share:.1g}'), 0.0001)}."
        )


def encode_and_count(
    tokenizer: HFTokenizer, texts: Sequence[str]
) -> tuple[list[list[int]], Lost]:
    """Returns the tokens of each text, and what they do not hold."""
    total = sum(map(len, texts))
    is_complete = _holds_every_byte(tokenizer)
    unknown_id = None if is_complete else tokenizer.unknown_token
    try:
        if unknown_id is None:
            batch = tokenizer.encode_batch(texts)
        else:
            return _encode_with_unknown(tokenizer, texts, unknown_id, total)
    except Exception as error:  # the library raises nothing more precise
        raise InputError(
            f"the tokenizer cannot encode this text: {error}; give one with a "
            "token for everything, such as bytes, or with an unknown token."
        ) from error
    vanished = collections.Counter()
    if not is_complete:
        for text in texts:
            if gone := {each for each in set(text) if _vanishes(tokenizer, each)}:
                vanished.update(each for each in text if each in gone)
    return batch, Lost(total, 0, vanished)


def _encode_with_unknown(
    tokenizer: HFTokenizer, texts: Sequence[str], unknown_id: int, total: int
) -> tuple[list[list[int]], Lost]:
    batch = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    unknown = sum(
        stop - start
        for each in batch
        if unknown_id in each.ids
        for token_id, (start, stop) in zip(each.ids, each.offsets, strict=True)
        if token_id == unknown_id
    )
    return [each.ids for each in batch], Lost(total, unknown)


@functools.lru_cache(maxsize=8)
def _holds_every_byte(tokenizer: HFTokenizer) -> bool:
    rules = json.loads(tokenizer.json)
    vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
    if rules["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    step = rules.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    is_byte_level = any(each.get("type") == "ByteLevel" for each in steps)
    return is_byte_level and vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet())


@functools.lru_cache(maxsize=2**16)
def _vanishes(tokenizer: HFTokenizer, character: str) -> bool:
    """Returns whether a character is dropped, anywhere in a word."""
    backend, text = tokenizer.backend, 3 * character
    model = backend.model
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return any(
        sum(stop - start for start, stop in (t.offsets for t in model.tokenize(word)))
        < len(word.encode())
        for word in words
    )
