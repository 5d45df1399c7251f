"""Offsets in two bytes a row answer as the array does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlasvi.store.offsets import Offsets


@given(st.lists(st.sampled_from([0, 0, 1, 2, 255, 256, 70_000]), max_size=300), st.data())
def test_they_are_the_array(lengths, data):
    array = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    offsets = Offsets(array)
    assert not offsets.falls
    assert len(offsets) == len(array) and offsets.shape == array.shape
    np.testing.assert_array_equal(offsets, array)
    n = len(array)
    a, b = data.draw(st.integers(-n, n)), data.draw(st.integers(-n, n))
    np.testing.assert_array_equal(offsets[a:b], array[a:b])
    np.testing.assert_array_equal(offsets[::2], array[::2])
    row = data.draw(st.integers(-n, n - 1))
    assert offsets[row] == array[row] and offsets[row].dtype == np.int64
    value = data.draw(st.integers(-2, int(array[-1]) + 2))
    for side in ("left", "right"):
        assert np.searchsorted(offsets, value, side=side) == np.searchsorted(array, value, side=side)
        found = np.searchsorted(offsets, [value, 0], side=side)
        np.testing.assert_array_equal(found, np.searchsorted(array, [value, 0], side=side))


def test_a_row_that_is_not_there():
    with pytest.raises(IndexError, match="row 3 asked of 3"):
        Offsets(np.array([0, 1, 2]))[3]


def test_falling_offsets_are_noticed_at_the_border_of_a_piece_too(monkeypatch):
    monkeypatch.setattr("atlasvi.store.offsets._PIECE", 64)
    array = np.cumsum(np.arange(200) % 7)
    np.testing.assert_array_equal(Offsets(array), array)
    assert not Offsets(array).falls
    array[64:] -= 2
    assert Offsets(array).falls


def test_two_bytes_a_row():
    offsets = Offsets(np.arange(0, 1_000_000, 1_000) * 1)
    assert offsets._lengths.dtype == np.uint16
