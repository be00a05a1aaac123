# SPDX-License-Identifier: Apache-2.0
"""Packing loses no prediction, mixes no documents, and reads any row at any time."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.formats import TokenSplit
from jaxllm.data.packing import best_fit, pack, row_without_targets

DOCUMENTS = st.lists(st.integers(1, 30), min_size=1, max_size=25)
LENGTHS = st.integers(1, 20)
PACKINGS = st.sampled_from(["concat", "best_fit"])


END = 9999  # the token that documents end in, where they end in one
LAST = st.sampled_from([None, END])


def make_split(documents, *, boundaries=True, end: int | None = None) -> TokenSplit:
    """Makes tokens 0, 1, 2, ..., so that a token says where it comes from.

    The token before the stream is END, which none of them is.
    """
    ends = np.cumsum(documents)
    tokens = np.arange(ends[-1], dtype=np.uint16)
    cut = len(tokens) // 3
    return TokenSplit(
        path="counted",
        shards=tuple(shard for shard in (tokens[:cut], tokens[cut:]) if len(shard)),
        document_ends=ends if boundaries else None,
        end_of_document=end,
        vocab_size=2**16,
        vocab_known=False,
        fingerprint="",
        tokenizer=None,
    )


def make_packed(documents, length, packing, *, end=None, keep_tail=True):
    split = make_split(documents, end=end)
    packed = pack(split, length, packing, keep_tail=keep_tail)
    return packed, packed.read(range(len(packed)))


def places(tokens) -> np.ndarray:
    """Returns where tokens are in the stream: -1 is the one before it."""
    return np.where(tokens == END, -1, tokens)


def predictions(rows) -> list[tuple[int, int]]:
    taken = rows["targets"] >= 0
    pairs = zip(places(rows["tokens"][taken]), rows["targets"][taken], strict=True)
    return sorted((int(token), int(target)) for token, target in pairs)


def pairs_of(documents, end=None) -> list[tuple[int, int]]:
    """Returns each token with the one that it is predicted from."""
    begins = {0, *np.cumsum(documents).tolist()} if end is None else set()
    return [(i - 1, i) for i in range(sum(documents)) if i not in begins]


@given(DOCUMENTS, LENGTHS, PACKINGS)
def test_every_token_is_a_target_exactly_once(documents, length, packing):
    _, rows = make_packed(documents, length, packing, end=END)
    assert predictions(rows) == pairs_of(documents, END)


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS)
def test_without_a_common_end_the_first_of_a_document_is_no_target(
    documents, length, packing
):
    _, rows = make_packed(documents, length, packing)
    assert predictions(rows) == pairs_of(documents)


@given(DOCUMENTS, LENGTHS, LAST)
def test_concat_without_its_tail_loses_only_the_last_partial_row(
    documents, length, end
):
    whole, all_rows = make_packed(documents, length, "concat", end=end)
    split = make_split(documents, end=end)
    packed = pack(split, length, "concat", keep_tail=False)
    assert len(packed) == (sum(documents) - (end is None)) // length
    assert len(whole) - len(packed) in (0, 1)
    rows = packed.read(range(len(packed)))
    for name, values in rows.items():
        np.testing.assert_array_equal(values, all_rows[name][: len(packed)])


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS, LAST)
def test_a_segment_holds_consecutive_tokens_of_one_document(
    documents, length, packing, end
):
    _, rows = make_packed(documents, length, packing, end=end)
    document_of = np.repeat(np.arange(len(documents)), documents)
    # Where documents end in one token, that of the one before begins a document.
    shift = 0 if end is None else 1
    for tokens, segments, positions in zip(
        rows["tokens"], rows["segments"], rows["positions"], strict=True
    ):
        used = segments > 0
        assert np.all(np.diff(used.astype(int)) <= 0)  # padding comes last
        numbers = np.unique(segments[used])
        np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
        for number in numbers:
            piece = places(tokens[segments == number])
            np.testing.assert_array_equal(piece, piece[0] + np.arange(len(piece)))
            np.testing.assert_array_equal(
                positions[segments == number], np.arange(len(piece))
            )
            assert len(np.unique(document_of[piece + shift])) == 1


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS, LAST)
def test_padding_has_no_token_no_position_and_no_target(
    documents, length, packing, end
):
    packed, rows = make_packed(documents, length, packing, end=end)
    padding = rows["segments"] == 0
    assert not rows["tokens"][padding].any()
    assert not rows["positions"][padding].any()
    assert (rows["targets"][padding] == -1).all()
    assert packed.fill_rate == pytest.approx(1 - padding.mean())
    assert {values.dtype for values in rows.values()} == {np.dtype(np.int32)}


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS, LAST, st.randoms())
def test_a_row_depends_on_its_number_only(documents, length, packing, end, random):
    packed, rows = make_packed(documents, length, packing, end=end)
    numbers = random.choices(range(len(packed)), k=5)
    again = packed.read(numbers)
    for name, values in again.items():
        np.testing.assert_array_equal(values, rows[name][numbers])


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, LAST)
def test_best_fit_cuts_only_documents_longer_than_a_row(documents, length, end):
    _, rows = make_packed(documents, length, "best_fit", end=end)
    shift = 0 if end is None else 1
    begins = np.cumsum(documents) - documents - shift
    found = places(rows["tokens"])
    for begin, tokens in zip(begins, documents, strict=True):
        slots = tokens - 1 + shift
        inputs = (found >= begin) & (found < begin + slots)
        inputs &= rows["segments"] > 0
        assert inputs.sum() == slots
        assert np.count_nonzero(inputs.any(axis=1)) == -(-slots // length)


@given(DOCUMENTS, st.integers(1, 8))
def test_documents_found_by_their_end_are_those_that_are_listed(documents, length):
    listed = make_split(documents, end=END)
    tokens = np.arange(listed.num_tokens, dtype=np.uint16)
    assert listed.document_ends is not None
    tokens[listed.document_ends - 1] = END
    listed = dataclasses.replace(listed, shards=(tokens,))
    found = dataclasses.replace(listed, document_ends=None)
    some, others = (
        (rows := pack(split, length, "concat", keep_tail=True)).read(range(len(rows)))
        for split in (listed, found)
    )
    for name, values in some.items():
        np.testing.assert_array_equal(values, others[name])


@given(st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=2), st.integers(2, 6))
def test_a_row_without_targets_is_found(documents, length):
    split = make_split(documents)
    packed = pack(split, length, "concat", keep_tail=False)
    empty = [
        row for row in range(len(packed)) if (packed.read([row])["targets"] < 0).all()
    ]
    assert row_without_targets(split, length) == (empty[0] if empty else None)
    assert row_without_targets(make_split(documents, end=END), length) is None


@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.just(40))
def test_best_fit_fills_rows_as_the_textbook_does(sizes, capacity):
    spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in spaces if space >= size]
        tightest = min(fitting, default=capacity)
        if fitting:
            spaces.remove(tightest)
        spaces.append(tightest - size)
    rows = best_fit(np.array(sizes), capacity)
    filled = np.bincount(rows, weights=sizes)
    assert sorted(capacity - filled) == sorted(spaces)


def test_best_fit_rows_follow_the_text():
    packed, rows = make_packed([3, 9, 4, 2, 8, 3, 9], 8, "best_fit")
    assert len(packed) == 4
    assert rows["tokens"][:, 0].tolist() == sorted(rows["tokens"][:, 0].tolist())


def test_best_fit_places_a_million_documents_in_seconds():
    sizes = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(np.int64)
    sizes = np.clip(sizes, 1, 2048)
    start = time.perf_counter()
    rows = best_fit(sizes, 2048)
    assert time.perf_counter() - start < 10
    assert sizes.sum() / ((rows.max() + 1) * 2048) > 0.999


def test_a_document_is_predicted_from_the_end_of_the_one_before():
    for packing in ("concat", "best_fit"):
        _, rows = make_packed([3, 4], 7, packing, end=END)
        assert rows["tokens"].tolist() == [[END, 0, 1, 2, 3, 4, 5]]
        assert rows["targets"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]
        assert rows["segments"].tolist() == [[1, 1, 1, 2, 2, 2, 2]]
        assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]


def test_without_a_common_end_concat_has_an_input_without_a_target():
    _, rows = make_packed([3, 4], 6, "concat")
    assert rows["tokens"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert rows["targets"].tolist() == [[1, 2, -1, 4, 5, 6]]
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 2, 2]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_without_a_common_end_best_fit_wastes_no_slot_between_documents():
    _, rows = make_packed([3, 4], 6, "best_fit")
    assert rows["tokens"].tolist() == [[0, 1, 3, 4, 5, 0]]
    assert rows["targets"].tolist() == [[1, 2, 4, 5, 6, -1]]
    assert rows["segments"].tolist() == [[1, 1, 2, 2, 2, 0]]
    assert rows["positions"].tolist() == [[0, 1, 0, 1, 2, 0]]


def test_a_document_that_began_earlier_has_positions_from_its_row():
    _, rows = make_packed([7, 2], 3, "concat", end=END)
    assert rows["positions"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 0, 1]]
    assert rows["segments"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 2, 2]]


def test_without_boundaries_a_row_is_one_segment():
    packed = pack(make_split([5, 8], boundaries=False), 4, "concat", keep_tail=False)
    rows = packed.read([0, 1, 2])
    assert (rows["segments"] == 1).all()
    assert rows["targets"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.parametrize("end", [None, END])
def test_empty_documents_leave_no_trace(end):
    split = make_split([3, 0, 0, 4], end=end)
    length = 6 if end is None else 7
    rows = pack(split, length, "concat", keep_tail=True).read([0])
    assert rows["segments"].tolist() == [[1, 1, 1] + [2] * (length - 3)]
    fitted = pack(split, length, "best_fit", keep_tail=True)
    assert predictions(fitted.read([0])) == pairs_of([3, 4], end)
