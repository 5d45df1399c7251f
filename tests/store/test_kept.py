"""Rows that are kept come back in their order, from memory and from runs on disk, in any types."""

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from atlasvi.store import kept
from atlasvi.store.kept import KeptRows
from atlasvi.store.layout import count_dtype, index_dtype

N_OBS, STEP, WORKERS = 300, 17, 3


def counts(n_vars, largest):
    """Cells with small counts only, with large ones, and with none."""
    random = np.random.default_rng(0)
    matrix = sp.random(N_OBS, n_vars, min(0.3, 60 / n_vars), format="csr", random_state=1, dtype=np.float64)
    matrix.data = random.integers(1, largest, matrix.nnz, endpoint=True).astype(np.float64)
    matrix.data[matrix.nnz // 2 :] %= 200
    matrix.data += 1
    matrix = sp.csr_matrix(sp.diags_array((np.arange(N_OBS) % 50 > 1).astype(float)) @ matrix)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix


def add_all(rows, matrix, places):
    def add(start):
        some = matrix[start : start + STEP]
        columns, values = some.indices.astype(np.uint32), some.data.astype(np.uint32)
        return rows.add(places[start : start + STEP], some.indptr.astype(np.int64), columns, values)

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(add, range(0, N_OBS, STEP)))


@pytest.mark.parametrize("n_bytes", [0, 1 << 22], ids=["on disk", "in memory"])
@pytest.mark.parametrize(
    ("n_vars", "largest", "ahead"),
    [(40, 3, False), (40, 300, True), (40, 70_000, True), (70_000, 3, True), (70_000, 300, False)],
)
def test_rows_come_back_in_their_order(tmp_path, monkeypatch, n_bytes, n_vars, largest, ahead):
    monkeypatch.setattr(kept, "_WRITE_WORDS", 64)
    matrix = counts(n_vars, largest)
    places = np.random.default_rng(1).permutation(N_OBS)
    expected = matrix[np.argsort(places)]
    rows = KeptRows(tmp_path, matrix.shape, n_bytes, WORKERS, spills=True, ahead=ahead)
    assert all(add_all(rows, matrix, places))
    # Memory is at least a few of the longest rows there may be, which here is all of the wide ones.
    assert (rows.bytes_on_disk > 0) == (n_bytes == 0 and n_vars == 40)
    offsets = expected.indptr.astype(np.int64)
    for begin in range(0, matrix.nnz, 501):
        end = min(begin + 501, matrix.nnz)
        start = int(np.searchsorted(offsets, begin, "right")) - 1
        stop = int(np.searchsorted(offsets, end, "left"))
        indices = np.zeros(end - begin, index_dtype(n_vars))
        data = np.zeros(end - begin, count_dtype(largest + 1))
        rows.fill(start, offsets[start : stop + 1], begin, indices, data)
        np.testing.assert_array_equal(indices, expected.indices[begin:end])
        np.testing.assert_array_equal(data, expected.data[begin:end])


def test_where_nothing_is_to_be_written_a_full_memory_is_said(tmp_path):
    matrix = counts(40, 3)
    rows = KeptRows(tmp_path, matrix.shape, 0, WORKERS, spills=False)
    assert not all(add_all(rows, matrix, np.arange(N_OBS)))
    assert rows.bytes_on_disk == 0


def test_a_full_disk_ends_every_thread(tmp_path, monkeypatch):
    def full(file, array):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(kept, "append", full)
    rows = KeptRows(tmp_path, (N_OBS, 40), 0, WORKERS, spills=True)
    with pytest.raises(OSError, match="no space"):
        add_all(rows, counts(40, 3), np.arange(N_OBS))


def test_runs_that_were_cut_short_are_named(tmp_path):
    matrix = counts(40, 3)
    rows = KeptRows(tmp_path, matrix.shape, 0, WORKERS, spills=True)
    add_all(rows, matrix, np.arange(N_OBS))
    with (tmp_path / "rows.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(OSError, match=r"rows\.bin ends at 8: was it changed"):
        rows.fill(
            0, matrix.indptr.astype(np.int64), 0, np.zeros(matrix.nnz, "u2"), np.zeros(matrix.nnz, "u1")
        )
