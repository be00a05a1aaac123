# SPDX-License-Identifier: Apache-2.0
"""Packs the tokens of a split into rows of equal length.

A packed split has a length (its rows), `read(rows)` and `fill_rate`. Access is random:
a row depends on its number only, so a position in the data is one number.

A row has T inputs and T targets: each target is the token after its input. Where all
documents end in one token (`TokenSplit.end_of_document`), that token is the input from
which the first token of the next document is predicted, in the segment of that document
and at position 0. The first document has one before it too, so every token is a target
exactly once, and a document of n tokens fills n slots. Elsewhere the first token of a
document is no target, and its n tokens fill n - 1 slots or have n - 1 targets.

Positions count from the start of the piece that is visible in the row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data.formats import TokenSplit

BATCH_NAMES = ("tokens", "targets", "segments", "positions")  # arrays of a batch
Rows = dict[str, np.ndarray]  # of BATCH_NAMES: int32 [rows, T]


@dataclasses.dataclass(frozen=True)
class ConcatRows:
    """The token stream split every T tokens; a document may go on in the next row."""

    split: TokenSplit
    sequence_length: int
    keep_tail: bool  # pad the last row; False drops its tokens

    @property
    def _before(self) -> int:
        """Tokens before the stream: 1 where an end-of-document token begins it."""
        return 0 if self.split.end_of_document is None else 1

    @property
    def _slots(self) -> int:
        """Slots of all tokens: inputs that have a token after them."""
        return max(self.split.num_tokens - 1 + self._before, 0)

    def __len__(self) -> int:
        up = self.sequence_length - 1 if self.keep_tail else 0
        return (self._slots + up) // self.sequence_length

    @property
    def fill_rate(self) -> float:
        """Returns the share of slots that hold a token."""
        slots = len(self) * self.sequence_length
        return min(self._slots, slots) / slots

    def read(self, rows: Sequence[int] | np.ndarray) -> Rows:
        """Returns the rows with these numbers, stacked."""
        length = self.sequence_length
        starts = np.asarray(rows, np.int64) * length - self._before
        stops = np.minimum(starts + length + 1, self.split.num_tokens)
        windows = np.zeros((len(starts), length + 1), np.int32)
        for window, start, stop in zip(
            windows, starts.tolist(), stops.tolist(), strict=True
        ):
            window[: stop - start] = self.split.slice(start, stop)

        index = np.arange(length, dtype=np.int32)
        used = index < (stops - starts - 1)[:, None]
        begins = self._document_begins(windows, starts)
        opens = begins[:, self._before : length + self._before].copy()
        opens[:, 0] = False  # a row begins with segment 1, whatever it begins with
        begin = np.maximum.accumulate(np.where(opens, index, 0), axis=1)
        segments = 1 + np.cumsum(opens, axis=1, dtype=np.int32)
        has_target = used if self._before else used & ~begins[:, 1:]
        return {
            "tokens": np.where(used, windows[:, :-1], 0),
            "targets": np.where(has_target, windows[:, 1:], -1),
            "segments": np.where(used, segments, 0),
            "positions": np.where(used, index - begin, 0),
        }

    def _document_begins(self, windows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Returns where in each window, after its first token, a document begins."""
        begins = np.zeros(windows.shape, bool)
        ends = self.split.document_ends
        if ends is not None:
            first = np.searchsorted(ends, starts, side="right")
            last = np.searchsorted(ends, starts + self.sequence_length, side="right")
            row, which = _ranges(first, last)
            begins[row, ends[which] - starts[row]] = True
        elif self.split.end_of_document is not None:
            begins[:, 1:] = windows[:, :-1] == self.split.end_of_document
        return begins


@dataclasses.dataclass(frozen=True)
class FittedRows:
    """Whole documents, several per row; only those longer than a row are split.

    The pieces of a long document overlap by the one token that is the target of one and
    the first input of the next.
    """

    split: TokenSplit
    sequence_length: int
    starts: np.ndarray  # first input of each piece; pieces lie in the order of rows
    sizes: np.ndarray  # slots of each piece: its inputs
    offsets: np.ndarray  # row i has the pieces from offsets[i] to offsets[i + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def fill_rate(self) -> float:
        """Returns the share of slots that hold a token."""
        return int(self.sizes.sum()) / (len(self) * self.sequence_length)

    def read(self, rows: Sequence[int] | np.ndarray) -> Rows:
        """Returns the rows with these numbers, stacked."""
        rows = np.asarray(rows, np.int64)
        row, which = _ranges(self.offsets[rows], self.offsets[rows + 1])
        starts, sizes = self.starts[which], self.sizes[which]
        pieces = [
            self.split.slice(start, start + size + 1)
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
        segment = 1 + np.arange(len(row)) - np.searchsorted(row, row)
        filled = np.bincount(row, weights=sizes, minlength=len(rows))
        used = np.arange(self.sequence_length) < filled[:, None]
        packed = {
            "tokens": np.concatenate([piece[:-1] for piece in pieces]),
            "targets": np.concatenate([piece[1:] for piece in pieces]),
            "segments": np.repeat(segment, sizes),
            "positions": _ranges(np.zeros_like(sizes), sizes)[1],
        }
        padded = empty_rows(len(rows), self.sequence_length)
        for name, values in packed.items():
            padded[name][used] = values
        return padded


PackedSplit = ConcatRows | FittedRows


def pack_all(
    config: DataConfig, splits: Sequence[TokenSplit], *, keep_tail: bool
) -> list[PackedSplit]:
    """Returns the rows of each split, as a config packs them."""
    length, packing = config.sequence_length, config.packing
    return [pack(split, length, packing, keep_tail=keep_tail) for split in splits]


def pack(
    split: TokenSplit,
    sequence_length: int,
    packing: Literal["concat", "best_fit"],
    *,
    keep_tail: bool,
) -> PackedSplit:
    """Returns the rows of a split.

    Args:
      split: its tokens and where its documents end.
      sequence_length: slots of a row, T.
      packing: "concat" splits documents at row ends, "best_fit" keeps them whole.
      keep_tail: concat: keep the last tokens in a padded row, as an evaluation must.
    """
    if packing == "concat":
        return ConcatRows(split, sequence_length, keep_tail)
    starts, sizes = _cut_documents(split, sequence_length)
    row_of_piece = best_fit(sizes, sequence_length)
    order = np.argsort(row_of_piece, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))])
    return FittedRows(split, sequence_length, starts[order], sizes[order], offsets)


def row_without_targets(split: TokenSplit, sequence_length: int) -> int | None:
    """Returns the first row of concat packing in which every target is a first token.

    Only documents of one token that do not end in a common one make such rows.
    """
    if split.end_of_document is not None or split.document_ends is None:
        return None
    begins = split.document_ends[:-1]
    breaks = np.flatnonzero(np.diff(begins) != 1) + 1
    first = begins[np.append(0, breaks)] if len(begins) else begins
    last = begins[np.append(breaks, len(begins)) - 1] if len(begins) else begins
    rows = -(
        -(first - 1) // sequence_length
    )  # row r has targets r * T + 1 to r * T + T
    found = rows[(rows + 1) * sequence_length <= last]
    return int(found[0]) if len(found) else None


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each piece: the largest first, each where least space is left.

    Pieces of one size, and rows with one amount of space, are interchangeable: a group
    of pieces goes into a group of rows at once, which places millions in seconds. Rows
    are numbered in the order of their first pieces, so that they follow the text.
    """
    rows = np.empty(len(sizes), np.int64)  # of the pieces, the largest first
    groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by space
    has_rows = np.zeros(capacity + 1, bool)
    counts = np.bincount(sizes, minlength=capacity + 1)
    num_rows = done = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        stop = done + int(counts[size])
        while done < stop:
            space = size + int(np.argmax(has_rows[size:]))
            if has_rows[space]:
                group = groups[space].pop()
                has_rows[space] = bool(groups[space])
            else:
                space = capacity
                needed = -(-(stop - done) // (space // size))
                group = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            # Fill a row at once: after a piece it is still the tightest row that fits.
            each = space // size
            full, rest = divmod(min(stop - done, len(group) * each), each)
            parts = group[:full], group[full : full + 1], group[full + 1 :]
            for part, take in zip(parts, (each, rest, 0), strict=True):
                if len(part):
                    rows[done : done + len(part) * take] = np.repeat(part, take)
                    done += len(part) * take
                    groups[space - take * size].append(part)
                    has_rows[space - take * size] = True
    row_of_piece = np.empty_like(rows)
    row_of_piece[np.argsort(-sizes, kind="stable")] = rows
    return _number_by_first_piece(row_of_piece, num_rows)


def empty_rows(num_rows: int, sequence_length: int) -> Rows:
    """Returns rows of padding: segment 0, and no target."""
    shape = (num_rows, sequence_length)
    rows = {name: np.zeros(shape, np.int32) for name in BATCH_NAMES}
    rows["targets"] -= 1
    return rows


def _cut_documents(
    split: TokenSplit, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first input and the slots of each piece, in the order of the text."""
    known = [] if split.document_ends is None else split.document_ends
    ends = np.append(known, split.num_tokens).astype(np.int64)
    begins = np.append(0, ends[:-1]) - (split.end_of_document is not None)
    slots = np.maximum(ends - begins - 1, 0)
    document, piece = _ranges(np.zeros_like(slots), -(-slots // sequence_length))
    done = piece * sequence_length
    sizes = np.minimum(slots[document] - done, sequence_length)
    return begins[document] + done, sizes


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of all ranges [first, last), and which range each is of."""
    counts = last - first
    row = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return row, np.arange(len(row)) - before[row] + first[row]


def _number_by_first_piece(row_of_piece: np.ndarray, num_rows: int) -> np.ndarray:
    first_piece = np.empty(num_rows, np.int64)
    # Of several values for one row the last assigned stays: its earliest piece.
    first_piece[row_of_piece[::-1]] = np.arange(len(row_of_piece))[::-1]
    number = np.empty(num_rows, np.int64)
    number[np.argsort(first_piece)] = np.arange(num_rows)
    return number[row_of_piece]
