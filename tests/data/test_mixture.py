# SPDX-License-Identifier: Apache-2.0
"""Mixtures keep exact shares, give each row once an epoch, and repeat no order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.mixture import MAX_ROWS, draw, mix_rows
from jaxllm.errors import InputError

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def order(mixture, start, stop):
    return [mixture.row(n) for n in range(start, stop)]


@given(SHARES)
def test_shares_are_exact_and_evenly_spread(shares):
    total = sum(shares)
    seen = np.zeros(len(shares), int)
    for n in range(2 * total):
        path, nth = draw(n, shares)
        assert nth == seen[path]  # each path is read in its own order, leaving none out
        seen[path] += 1
        expected = (n + 1) * np.array(shares) / total
        assert np.abs(seen - expected).max() < len(shares)
        if n + 1 == total:
            assert seen.tolist() == shares


def test_weights_are_taken_as_written():
    mixture = mix_rows([50, 80], (0.7, 0.3), seed=0, shuffle=True)
    paths = [path for path, _ in order(mixture, 0, 1000)]
    assert paths.count(0) == 700
    assert mixture.proportions == (7, 3)


def test_without_weights_every_row_comes_once_an_epoch():
    sizes = (31, 7, 120)
    mixture = mix_rows(sizes, (), seed=3, shuffle=True)
    every_row = {(path, row) for path, size in enumerate(sizes) for row in range(size)}
    for epoch in range(3):
        rows = order(mixture, epoch * 158, (epoch + 1) * 158)
        assert len(rows) == len(set(rows))
        assert set(rows) == every_row


def test_orders_of_epochs_seeds_and_paths_all_differ():
    orders = [
        tuple(mix_rows([64, 64], (), seed=seed, shuffle=True).orders[path][start:stop])
        for seed in range(4)
        for path in range(2)
        for start, stop in ((0, 64), (64, 128), (128, 192))
    ]
    assert len(set(orders)) == len(orders)
    assert {tuple(sorted(rows)) for rows in orders} == {tuple(range(64))}


def test_without_shuffle_each_path_is_read_in_order_again_and_again():
    mixture = mix_rows([3, 6], (), seed=9, shuffle=False)
    rows = order(mixture, 0, 18)
    assert [row for path, row in rows if path == 0] == [0, 1, 2] * 2
    assert [row for path, row in rows if path == 1] == [0, 1, 2, 3, 4, 5] * 2


def test_more_rows_than_can_be_shuffled_are_refused():
    with pytest.raises(InputError, match=r"config\.data\.sequence_length"):
        mix_rows([10, MAX_ROWS + 1], (), seed=0, shuffle=True)


def test_the_largest_number_of_rows_can_be_shuffled():
    mixture = mix_rows([MAX_ROWS], (), seed=2**32 - 1, shuffle=True)
    rows = [row for _, row in order(mixture, 0, 100)]
    assert len(set(rows)) == 100
    assert 0 <= min(rows) and max(rows) < MAX_ROWS
