# SPDX-License-Identifier: Apache-2.0
"""Text of tokens as they are generated, equal to the text of all of them at once."""

from collections.abc import Iterable

from jaxllm.text.tokenizers import Tokenizer


class TextStream:
    """Gives the text of one prompt's new tokens, piece by piece.

    All pieces and what `flush` returns are `decode(prompt and tokens)` without its
    first `len(decode(prompt))` characters, for every tokenizer. Text that a later token
    may still change is held back: an incomplete character, a run of byte-fallback
    tokens, which is decoded as a whole, and everything where `streams_text` is false.

    The window of tokens that is decoded begins with those of the piece before: decoders
    treat the first token of a text differently, and the next one by its neighbour.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]):
        self._tokenizer = tokenizer
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
        if self._is_open or not self._tokenizer.streams_text:
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
        opens = self._tokenizer.opens_run(token_id)
        return self._is_open if opens is None else opens

    def _advance(self):
        # Context without text would not count as the beginning that it must replace.
        context = self._window[self._num_context :]
        if text := self._tokenizer.decode(context):
            self._window, self._num_context = context, len(context)
            self._num_given = len(text)
