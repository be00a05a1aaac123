# SPDX-License-Identifier: Apache-2.0
"""Packing loses no prediction, mixes no documents, and reads any row at any time."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.formats import TokenSplit
from jaxllm.data.packing import best_fit, pack

DOCUMENTS = st.lists(st.integers(1, 30), min_size=1, max_size=25)
LENGTHS = st.integers(1, 20)
PACKINGS = st.sampled_from(["concat", "best_fit"])


def make_split(documents, *, boundaries=True) -> TokenSplit:
    """Makes tokens 0, 1, 2, ..., so that a token says where it comes from."""
    ends = np.cumsum(documents)
    tokens = np.arange(ends[-1], dtype=np.uint16)
    cut = len(tokens) // 3
    return TokenSplit(
        path="counted",
        shards=tuple(shard for shard in (tokens[:cut], tokens[cut:]) if len(shard)),
        document_ends=ends if boundaries else None,
        vocab_size=2**16,
        vocab_known=False,
        fingerprint="",
        tokenizer=None,
    )


def make_packed(documents, length, packing, *, keep_tail=True):
    packed = pack(make_split(documents), length, packing, keep_tail=keep_tail)
    return packed, packed.read(range(len(packed)))


def predictions(rows) -> list[tuple[int, int]]:
    taken = rows["targets"] >= 0
    pairs = zip(rows["tokens"][taken], rows["targets"][taken], strict=True)
    return sorted((int(token), int(target)) for token, target in pairs)


def pairs_within(documents) -> list[tuple[int, int]]:
    ends = set(np.cumsum(documents).tolist())
    return [(i, i + 1) for i in range(max(ends) - 1) if i + 1 not in ends]


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS)
def test_every_token_but_the_first_of_a_document_is_predicted_once(
    documents, length, packing
):
    _, rows = make_packed(documents, length, packing)
    assert predictions(rows) == pairs_within(documents)


@given(DOCUMENTS, LENGTHS)
def test_concat_without_its_tail_loses_only_the_last_partial_row(documents, length):
    whole, all_rows = make_packed(documents, length, "concat")
    packed = pack(make_split(documents), length, "concat", keep_tail=False)
    assert len(packed) == (sum(documents) - 1) // length
    assert len(whole) - len(packed) in (0, 1)
    rows = packed.read(range(len(packed)))
    for name, values in rows.items():
        np.testing.assert_array_equal(values, all_rows[name][: len(packed)])


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS)
def test_a_segment_holds_consecutive_tokens_of_one_document(documents, length, packing):
    _, rows = make_packed(documents, length, packing)
    document_of = np.repeat(np.arange(len(documents)), documents)
    for tokens, segments, positions in zip(
        rows["tokens"], rows["segments"], rows["positions"], strict=True
    ):
        used = segments > 0
        assert np.all(np.diff(used.astype(int)) <= 0)  # padding comes last
        numbers = np.unique(segments[used])
        np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
        for number in numbers:
            piece = tokens[segments == number]
            np.testing.assert_array_equal(piece, piece[0] + np.arange(len(piece)))
            np.testing.assert_array_equal(
                positions[segments == number], np.arange(len(piece))
            )
            assert len(np.unique(document_of[piece])) == 1


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS)
def test_padding_has_no_token_no_position_and_no_target(documents, length, packing):
    packed, rows = make_packed(documents, length, packing)
    padding = rows["segments"] == 0
    assert not rows["tokens"][padding].any()
    assert not rows["positions"][padding].any()
    assert (rows["targets"][padding] == -1).all()
    assert packed.fill_rate == pytest.approx(1 - padding.mean())
    assert {values.dtype for values in rows.values()} == {np.dtype(np.int32)}


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS, PACKINGS, st.randoms())
def test_a_row_depends_on_its_number_only(documents, length, packing, random):
    packed, rows = make_packed(documents, length, packing)
    numbers = random.choices(range(len(packed)), k=5)
    again = packed.read(numbers)
    for name, values in again.items():
        np.testing.assert_array_equal(values, rows[name][numbers])


@given(DOCUMENTS.filter(lambda d: max(d) > 1), LENGTHS)
def test_best_fit_cuts_only_documents_longer_than_a_row(documents, length):
    _, rows = make_packed(documents, length, "best_fit")
    begins = np.cumsum(documents) - documents
    for begin, tokens in zip(begins, documents, strict=True):
        inputs = (rows["tokens"] >= begin) & (rows["tokens"] < begin + tokens - 1)
        inputs &= rows["segments"] > 0
        assert inputs.sum() == tokens - 1
        assert np.count_nonzero(inputs.any(axis=1)) == -(-(tokens - 1) // length)


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


def test_concat_shows_a_document_end_as_input_without_a_target():
    _, rows = make_packed([3, 4], 6, "concat")
    assert rows["tokens"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert rows["targets"].tolist() == [[1, 2, -1, 4, 5, 6]]
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 2, 2]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_best_fit_wastes_no_slot_between_documents():
    _, rows = make_packed([3, 4], 6, "best_fit")
    assert rows["tokens"].tolist() == [[0, 1, 3, 4, 5, 0]]
    assert rows["targets"].tolist() == [[1, 2, 4, 5, 6, -1]]
    assert rows["segments"].tolist() == [[1, 1, 2, 2, 2, 0]]
    assert rows["positions"].tolist() == [[0, 1, 0, 1, 2, 0]]


def test_a_document_that_began_earlier_has_positions_from_its_row():
    _, rows = make_packed([7, 2], 3, "concat")
    assert rows["positions"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 2, 0]]


def test_without_boundaries_a_row_is_one_segment():
    packed = pack(make_split([5, 8], boundaries=False), 4, "concat", keep_tail=False)
    rows = packed.read([0, 1, 2])
    assert (rows["segments"] == 1).all()
    assert rows["targets"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_tokens_after_the_last_boundary_are_another_document():
    split = make_split([3, 4], boundaries=False)
    split = dataclasses.replace(split, document_ends=np.array([3]))
    rows = pack(split, 6, "concat", keep_tail=True).read([0])
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 2, 2]]
    fitted = pack(split, 6, "best_fit", keep_tail=True)
    assert predictions(fitted.read([0])) == pairs_within([3, 4])


def test_empty_documents_leave_no_trace():
    split = make_split([3, 0, 0, 4])
    rows = pack(split, 6, "concat", keep_tail=True).read([0])
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 2, 2]]
    assert predictions(pack(split, 6, "best_fit", keep_tail=True).read([0])) == (
        pairs_within([3, 4])
    )
