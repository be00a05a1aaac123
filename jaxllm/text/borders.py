# SPDX-License-Identifier: Apache-2.0
"""Where a long document may be cut, so that its pieces have the tokens of the whole.

No table of tokenizers says so: the tokenizer itself is asked, in two ways. Short random
texts of everything that its rules name show which kinds of borders it allows anywhere;
rules that count or pair characters fail here. Then every cut is compared, with the text
around it: this finds words of the vocabulary that contain a border.
"""

import collections
import dataclasses
import functools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from jaxllm.text.tokenizers import BytesTokenizer, HFTokenizer, Tokenizer

# After a line, else before a word: GPT-2's pre-tokenization, and most others, do not
# join text across these.
_BORDERS = (re.compile(r"\S\n(?=\S)"), re.compile(r"\S(?= \S)"))
_BORDER_BYTES = 2**16  # bytes at the end of a piece that are searched first
_CONTEXT = 512  # characters on each side of a cut that are compared
_TRIES = 4  # borders at most that are compared, of one kind and piece

_NUM_PROBES = 500
_PROBE_TEXT = (
    "aAbsZ019 .,;:!?'\"()[]{}<>|/_-@#`\n\n  \t\r \u00e9\u00df\u0434\u6c34\u3002"
    "\u0301\u00a0\u3000\u0600\u200d\U0001f600"
)


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts long documents for one tokenizer."""

    continuation: Tokenizer  # of all pieces but the first
    borders: tuple[re.Pattern[str], ...]  # () keeps documents whole

    def cut(self, text: bytearray, start: int) -> int | None:
        """Returns where valid UTF-8 that continues may be cut, after `start`."""
        if isinstance(self.continuation, BytesTokenizer):
            return _last_character(text)
        for begin in dict.fromkeys((max(start, len(text) - _BORDER_BYTES), start)):
            if at := self._search(text, begin):
                return at
        return None

    def _search(self, text: bytearray, begin: int) -> int | None:
        begin, end = _first_character(text, begin), _last_character(text)
        window = text[begin:end].decode()
        for border in self.borders:
            found = collections.deque(border.finditer(window), maxlen=_TRIES)
            for at in (match.end() for match in reversed(found)):
                left, right = window[max(at - _CONTEXT, 0) : at], window[at:]
                if self._is_cut(left, right[:_CONTEXT]):
                    return begin + len(window[:at].encode())
        return None

    def _is_cut(self, left: str, right: str) -> bool:
        whole, *parts = self.continuation.encode_batch([left + right, left, right])
        return whole == parts[0] + parts[1]


@functools.lru_cache(maxsize=8)
def make_cutter(tokenizer: Tokenizer) -> Cutter:
    """Returns where this tokenizer allows cuts."""
    if isinstance(tokenizer, BytesTokenizer):
        return Cutter(tokenizer, _BORDERS)
    texts = list(_probes(tokenizer))
    cutters = [
        Cutter(each, tuple(b for b in _BORDERS if _is_safe(b, tokenizer, each, texts)))
        for each in dict.fromkeys((tokenizer, _without_beginning(tokenizer)))
    ]
    return max(cutters, key=lambda cutter: len(cutter.borders))


def cut_anywhere(text: bytearray, start: int) -> int | None:
    """Returns where a text may be cut for training a tokenizer: at any border."""
    begin = _first_character(text, max(start, len(text) - _BORDER_BYTES))
    window = text[begin : _last_character(text)].decode()
    for border in _BORDERS:
        if found := collections.deque(border.finditer(window), maxlen=1):
            return begin + len(window[: found[0].end()].encode())
    return _last_character(text)


def _is_safe(
    border: re.Pattern[str], first: Tokenizer, rest: Tokenizer, texts: list[str]
) -> bool:
    halves = [
        (text[: match.end()], text[match.end() :])
        for text in texts
        for match in border.finditer(text)
    ]
    right = rest.encode_batch([after for _, after in halves])
    for beginning in dict.fromkeys((first, rest)):
        left = beginning.encode_batch([before for before, _ in halves])
        whole = beginning.encode_batch([before + after for before, after in halves])
        if whole != [mine + its for mine, its in zip(left, right, strict=True)]:
            return False
    return True


def _probes(tokenizer: HFTokenizer) -> Iterator[str]:
    """Yields texts of what the tokenizer's rules name, and of tokens with borders."""
    rules = json.loads(tokenizer.json)
    named = [rules.get("normalizer"), rules.get("pre_tokenizer")]
    atoms = [*_PROBE_TEXT, *json.dumps(named, ensure_ascii=False)]
    atoms += [token["content"] for token in rules.get("added_tokens") or ()]
    ids = tokenizer.backend.get_vocab(with_added_tokens=True).values()
    decoded = tokenizer.backend.decode_batch([[i] for i in ids])
    inside = sorted(text for text in decoded if re.search(r"\S\s+\S", text))
    draw = random.Random(0)
    for text in draw.sample(inside, min(len(inside), _NUM_PROBES)):
        yield text
        yield f"a {text}. a"
    for _ in range(_NUM_PROBES):
        halves = ("".join(draw.choices(atoms, k=draw.randint(1, 9))) for _ in "12")
        yield draw.choice(("\n", " ")).join(halves)


def _without_beginning(tokenizer: HFTokenizer) -> HFTokenizer:
    """Returns a tokenizer that treats the beginning of a text as any other place."""
    rules = json.loads(tokenizer.backend.to_str())
    names = "normalizer", "pre_tokenizer"
    changed = {name: _edit(rules[name]) for name in names}
    if all(changed[name] == rules[name] for name in names):
        return tokenizer
    content = json.dumps(rules | changed).encode()
    return dataclasses.replace(tokenizer, json=content)


def _edit(step: Any) -> Any:
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    for inner in ("normalizers", "pretokenizers"):
        if inner in step:
            step[inner] = [each for each in map(_edit, step[inner]) if each]
    for name, value in {
        "strip_left": False,
        "prepend_scheme": "never",
        "add_prefix_space": False,
    }.items():
        if name in step:
            step[name] = value
    return step


def _first_character(text: bytearray, at: int) -> int:
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _last_character(text: bytearray) -> int:
    """Returns where the last character begins, which may be incomplete."""
    at = len(text) - 1
    while at > 0 and text[at] & 0xC0 == 0x80:
        at -= 1
    return at
