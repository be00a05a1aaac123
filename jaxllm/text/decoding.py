# SPDX-License-Identifier: Apache-2.0
"""Text of tokens as they are generated, equal to the text of all of them at once."""

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

from jaxllm.text.tokenizers import BytesTokenizer, Tokenizer

_KNOWN_STEPS = ("ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # of byte fallback


class TextStream:
    """Gives the text of one prompt's new tokens, piece by piece.

    All pieces and what `flush` returns are `decode(prompt and tokens)` without its
    first `len(decode(prompt))` characters, for every tokenizer. Text that a later token
    may still change is held back: an incomplete character, a run of byte-fallback
    tokens, which is decoded as a whole, and all that is decoded in an unknown way.

    The window of tokens that is decoded begins with those of the piece before: decoders
    treat the first token of a text differently, and the next one by its neighbour.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]):
        self._tokenizer = tokenizer
        self._steps = _decoder_steps(tokenizer)
        self._is_known = _is_known(self._steps)
        self._window = list(prompt_ids)
        self._num_context = len(self._window)  # tokens whose text was given before
        self._num_given = len(tokenizer.decode(self._window))  # characters
        self._is_open = False  # a later token may change the text of the last one
        for token_id in self._window:
            self._is_open = self._opens(token_id)

    def add(self, token_id: int) -> str:
        """Returns the text that is certain now; often that of `token_id`."""
        self._window.append(token_id)
        self._is_open = self._opens(token_id)
        if self._is_open or not self._is_known:
            return ""
        text = self._tokenizer.decode(self._window)
        is_complete = not text.endswith("\ufffd")
        piece = text[self._num_given : len(text) if is_complete else -1]
        self._num_given += len(piece)
        if is_complete:
            self._advance()
        return piece

    def flush(self) -> str:
        """Returns the text held back; the stream has ended."""
        return self._tokenizer.decode(self._window)[self._num_given :]

    def _opens(self, token_id: int) -> bool:
        """Returns whether later tokens may change the text of the tokens so far."""
        if isinstance(self._tokenizer, BytesTokenizer):
            return False
        token = self._tokenizer.shown_token(token_id)
        if token is None:
            return self._is_open
        kinds = [step["type"] for step in self._steps]
        if "BPEDecoder" in kinds:  # its suffix is a space, but for the last token
            suffix = self._steps[0]["suffix"]
            last = token.replace(suffix, "")
            return not token.replace(suffix, " ").startswith(last)
        return "ByteFallback" in kinds and bool(_BYTE_TOKEN.fullmatch(token))

    def _advance(self):
        # Context without text would not count as the beginning that it must replace.
        context = self._window[self._num_context :]
        if text := self._tokenizer.decode(context):
            self._window, self._num_context = context, len(context)
            self._num_given = len(text)


@functools.lru_cache(maxsize=8)
def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if isinstance(tokenizer, BytesTokenizer):
        return []
    return _flatten(json.loads(tokenizer.json).get("decoder"))


def _flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a decoder, or of a part of one, in order."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [each for inner in step["decoders"] for each in _flatten(inner)]
    return [step]


def _is_known(steps: list[dict[str, Any]]) -> bool:
    """Returns whether these steps are known to keep the text of complete tokens.

    They work on a list of texts, one a token, until one joins them. From there on only
    what works on single characters, or on the beginning of the text, keeps it.
    """
    kinds = [step["type"] for step in steps]
    if "BPEDecoder" in kinds:
        return kinds[0] == "BPEDecoder" and set(kinds[1:]) <= {"Fuse"}
    is_joined = False
    for i, step in enumerate(steps):
        kind = step["type"]
        pattern = step.get("pattern", {}).get("String", "")
        if is_joined:
            keeps = (
                kind == "Fuse"
                or (kind == "Strip" and not step["stop"])
                or (kind == "Replace" and len(pattern) == 1 and pattern != "\ufffd")
            )
        elif kind == "ByteFallback":  # its tokens must be as they are in the vocabulary
            keeps = all(each.get("content") == " " for each in steps[:i])
        elif kind == "CTC":
            keeps = i == 0
        else:
            keeps = kind in _KNOWN_STEPS
        if not keeps:
            return False
        is_joined |= kind in ("Fuse", "ByteLevel")
    return True
