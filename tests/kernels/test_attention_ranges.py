# SPDX-License-Identifier: Apache-2.0
"""Key ranges and the bounds of tiles against the mask of the specification."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import ranges
from pallas_kernels.attention.reference import visible_keys

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def masks(draw):
    """Draws what `key_ranges` takes, and the mask the specification makes of it."""
    # Few shapes: JAX compiles its operations for each.
    b, t, s = draw(st.sampled_from([(2, 24, 24), (1, 7, 7), (2, 5, 17), (1, 24, 8)]))
    options = dict(causal=draw(st.booleans()), window=draw(st.sampled_from([0, 1, 5])))
    segments_BT = positions_BT = None
    kind = draw(st.sampled_from(["plain", "packed", "placed"]))
    if kind == "packed":
        b, t, s = 2, 24, 24
        ids = st.lists(st.integers(0, 3), min_size=b * t, max_size=b * t)
        segments_BT = jnp.asarray(draw(ids), jnp.int32).reshape(b, t)
    if kind == "placed":
        places = st.lists(st.integers(-2, s + 2), min_size=b * t, max_size=b * t)
        positions_BT = jnp.asarray(draw(places), jnp.int32).reshape(b, t)
    options |= dict(segments_BT=segments_BT, positions_BT=positions_BT)
    start_BT, end_BT = ranges.key_ranges((b, t, 1, 1), s, **options)
    mask_BTS = jnp.broadcast_to(visible_keys(t, s, **options), (b, t, s))
    return start_BT, end_BT, np.asarray(mask_BTS)


@given(masks())
@quick
def test_ranges_are_the_mask_of_the_specification(drawn):
    start_BT, end_BT, mask_BTS = drawn
    assert np.all(np.asarray(start_BT) <= np.asarray(end_BT))
    got = ranges.visible_in_ranges(start_BT, end_BT, mask_BTS.shape[2])
    np.testing.assert_array_equal(got, mask_BTS)


@pytest.mark.parametrize("window", [24, 2**30, 2**31 - 1, 2**31, 2**63])
def test_a_window_of_all_keys_or_more_is_none(window):
    options: dict[str, Any] = dict(causal=True, segments_BT=None, positions_BT=None)
    found = ranges.key_ranges((1, 24, 1, 1), 24, window=window, **options)
    expected = ranges.key_ranges((1, 24, 1, 1), 24, window=0, **options)
    np.testing.assert_array_equal(found, expected)
    found = visible_keys(24, 24, window=window, **options)
    np.testing.assert_array_equal(found, visible_keys(24, 24, **options))


@given(masks(), st.sampled_from([4, 8]))
@quick
def test_bounds_of_query_tiles_enclose_what_is_seen_and_what_all_see(drawn, block):
    start_BT, end_BT, mask_BTS = drawn
    bounds = ranges.query_tile_bounds(start_BT, end_BT, mask_BTS.shape[2], block)
    lo, full_lo, full_hi, hi = map(np.asarray, bounds)
    assert np.all((lo <= full_lo) & (full_lo <= full_hi) & (full_hi <= hi))
    for b, i in np.ndindex(lo.shape):
        tile = mask_BTS[b, i * block : (i + 1) * block]
        seen = np.flatnonzero(tile.any(0))
        expected = (seen[0], seen[-1] + 1) if seen.size else (0, 0)
        assert (lo[b, i], hi[b, i]) == expected
        everyone = np.flatnonzero(tile.all(0))
        assert full_hi[b, i] - full_lo[b, i] == everyone.size
        assert tile[:, full_lo[b, i] : full_hi[b, i]].all()


@given(masks(), st.just(4), st.sampled_from([4, 8]))
@quick
def test_bounds_of_key_tiles_enclose_the_queries_that_see_them(drawn, block_q, block):
    start_BT, end_BT, mask_BTS = drawn
    t, s = mask_BTS.shape[1:]
    bounds = ranges.key_tile_bounds(start_BT, end_BT, s, block_q, block)
    lo, full_lo, full_hi, hi = map(np.asarray, bounds)
    assert np.all((lo <= full_lo) & (full_lo <= full_hi) & (full_hi <= hi))
    for b, j in np.ndindex(lo.shape):
        tile = mask_BTS[b, :, j * block : (j + 1) * block]
        seen = np.flatnonzero(tile.any(1))
        inside = (seen // block_q >= lo[b, j]) & (seen // block_q < hi[b, j])
        assert inside.all()
        assert tile[full_lo[b, j] * block_q : full_hi[b, j] * block_q].all()
        if full_lo[b, j] < full_hi[b, j]:
            assert (j + 1) * block <= s and full_lo[b, j] * block_q < t


def test_an_id_that_returns_is_another_document():
    segments_BT = jnp.asarray([[1, 1, 2, 1, 0, 1, 1]], jnp.int32)
    start_BT, end_BT = ranges.document_ranges(segments_BT)
    np.testing.assert_array_equal(start_BT, [[0, 0, 2, 3, 4, 5, 5]])
    np.testing.assert_array_equal(end_BT, [[2, 2, 3, 4, 4, 7, 7]])
