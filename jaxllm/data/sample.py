# SPDX-License-Identifier: Apache-2.0
"""A sample of a stream of tokens: what is learned of a file without reading it all.

256 blocks of 4096 tokens, evenly spread; a stream of up to a million tokens is read
whole. The cost is that of 256 reads, whatever the size of the data.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

BLOCKS, BLOCK_TOKENS = 256, 4096
_MIN_PAIRS = 64
_MAX_HIGH = 15  # the high half of an id, for vocabularies of up to a million ids

Slice = Callable[[int, int], np.ndarray]  # start, stop -> tokens


def blocks(num_tokens: int, slice_tokens: Slice) -> Iterator[np.ndarray]:
    """Yields the tokens of the sample; each block begins at an even number."""
    last = max(num_tokens - BLOCK_TOKENS, 0)
    starts = {last * block // (BLOCKS - 1) // 2 * 2 for block in range(BLOCKS)}
    if num_tokens <= BLOCKS * BLOCK_TOKENS:
        starts = range(0, num_tokens, BLOCK_TOKENS)
    for start in sorted(starts):
        yield slice_tokens(start, min(start + BLOCK_TOKENS, num_tokens))


def sampled_hash(
    num_tokens: int, slice_tokens: Slice, ends: np.ndarray | None, also: str
) -> str:
    """Returns a hash of the sample, of all ends of documents, and of a text."""
    digest = hashlib.sha256(f"sample {num_tokens} {also}".encode())
    for block in blocks(num_tokens, slice_tokens):
        digest.update(block.astype("<i4").tobytes())
    if ends is not None:
        digest.update(ends.astype("<i8").tobytes())
    return digest.hexdigest()


def occurrences(num_tokens: int, slice_tokens: Slice, token: int) -> tuple[int, int]:
    """Returns how often a token is in the sample, and the largest id in it."""
    count, largest = 0, 0
    for block in blocks(num_tokens, slice_tokens):
        count += int(np.count_nonzero(block == token))
        largest = max(largest, int(block.max(initial=0)))
    return count, largest


def looks_like_uint32(num_halves: int, slice_halves: Slice) -> bool:
    """Returns whether a file that was read as uint16 holds uint32.

    Then every second number is the high half of an id: below 16, and one of few values
    beside those between them. In a stream of uint16 both are alike, whatever its
    vocabulary.
    """
    low, high = set[int](), set[int]()
    pairs = 0
    for block in blocks(num_halves, slice_halves):
        whole = block[: len(block) // 2 * 2]
        high |= set(np.unique(whole[1::2]).tolist())
        if high and max(high) > _MAX_HIGH:
            return False
        low |= set(np.unique(whole[::2]).tolist())
        pairs += len(whole) // 2
    return pairs >= _MIN_PAIRS and len(low) >= 16 * len(high)


def common_end(slice_tokens: Slice, ends: np.ndarray) -> int | None:
    """Returns the token that all documents end in, as far as a sample of them tells.

    One document tells nothing; of several it looks at 256, evenly spread.
    """
    if len(ends) < 2:
        return None
    chosen = ends[np.linspace(0, len(ends) - 1, min(BLOCKS, len(ends)), dtype=np.int64)]
    last = {int(slice_tokens(end - 1, end)[0]) for end in chosen.tolist()}
    return last.pop() if len(last) == 1 else None
