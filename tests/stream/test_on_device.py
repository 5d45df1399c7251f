"""Counts that stay on a device: the same minibatches, made there, and the store is left alone.

The device is the CPU here: every line but the copying itself is the one that a GPU runs.
"""

import logging
from dataclasses import fields
from itertools import islice

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from atlasvi_kernels import CSR

import atlasvi
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import register, resolve
from atlasvi.stream import Epochs, Room
from atlasvi.stream.on_device import OnDevice
from atlasvi.stream.plan import Unit
from atlasvi.types import Minibatch
from tests.stream.conftest import KINDS, N

ODD = np.arange(3, N, 2)


def room(n_bytes=1 << 30):
    return Room(torch.device("cpu"), n_bytes)


def codes_of(atlas):
    return resolve(register(atlas, batch_key="batch", gene_mask=None), atlas)


def same(one, other):
    """Bit for bit, types and all."""
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        tensors = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Minibatch)]
        tensors += [(getattr(a.counts, n), getattr(b.counts, n)) for n in ("indptr", "indices", "data")]
        for x, y in tensors:
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("options", "genes"),
    [
        ({"num_workers": 0}, None),
        ({"num_workers": 2, "positions": ODD}, None),
        ({"num_workers": 0, "positions": ODD}, np.arange(40, 3, -2)),
        ({"num_workers": 0, "weights": np.where(KINDS == "a", 1.0, 5.0)}, None),
        ({"num_workers": 0, "shuffle": False}, None),
    ],
)
def test_the_same_minibatches_and_the_store_is_read_once(atlas, reads, options, genes):
    view = atlas if genes is None else atlas[200:, genes]
    if genes is not None:
        options = options | {"positions": ODD[ODD < len(view)]}
    options = {"batch_size": 64, "seed": 5} | options
    codes = codes_of(view)
    here, fresh = Epochs(view, codes, room=room(), **options), Epochs(view, codes, keep=False, **options)
    assert here.kept == "on cpu" and fresh.kept == ""
    for epoch in range(3):
        same(here(epoch), fresh(epoch))
    same(here(4, 3), fresh(4, 3))
    assert not list(here(4, here.plan(4).n_minibatches))
    reads.clear()
    for epoch in range(1, 6):
        list(here(epoch))
    assert reads == []


def test_cells_of_a_view_and_of_several_stores_are_theirs(counts, tmp_path):
    """Stores whose counts are of other types than one another are held in one that has room for each."""
    parts, paths = [], []
    for most in (60_000, 70_000):  # which have the highest bit of uint16, and one more
        part = counts.copy()
        part.data[::7] = most
        adata = anndata.AnnData(part)
        adata.obs_names = [f"{most}-{i}" for i in range(N)]
        parts.append(part)
        paths.append(tmp_path / f"{most}.zarr")
        atlasvi.ingest(adata, paths[-1])
    whole = sp.vstack(parts).tocsr()
    with atlasvi.open(paths) as both:
        types = {both.read_rows(slice(at, at + 9)).data.dtype for at in (0, N)}
        assert types == {torch.uint16, torch.uint32}
        view = both[np.arange(400, 1_500)]
        epochs = Epochs(view, batch_size=100, seed=1, room=room(), num_workers=0)
        for epoch in range(2):
            for csr, rows in epochs.counts(epoch):
                np.testing.assert_array_equal(csr.to_dense(), whole[rows].toarray())
        assert csr.data.dtype == torch.uint32 and csr.indices.dtype == torch.uint16


def test_what_was_seen_of_an_epoch_that_was_left_is_not_copied_again(atlas, reads):
    codes = codes_of(atlas)
    options = {"batch_size": 32, "num_workers": 0, "memory_budget": "30 kB"}
    here, fresh = Epochs(atlas, codes, room=room(), **options), Epochs(atlas, codes, keep=False, **options)
    same(islice(here(0), 3), islice(fresh(0), 3))
    part = here._on_device.nbytes
    all_there_is = atlas.read_rows(slice(None))
    whole = all_there_is.indices.nbytes + all_there_is.data.nbytes
    assert 0 < part < whole
    same(here(1, 20), fresh(1, 20))
    assert here._on_device.nbytes < whole
    same(here(2), fresh(2))
    assert here._on_device.nbytes == whole
    reads.clear()
    list(here(0))
    assert reads == []


def test_blocks_that_weights_leave_out_need_not_be_there(atlas, reads):
    epochs = Epochs(atlas, batch_size=32, weights=np.where(np.arange(N) < 400, 0.0, 1.0), room=room())
    list(epochs.counts(0))
    reads.clear()
    assert min(rows.min() for _, rows in epochs.counts(1)) >= 400
    assert reads == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_process_holds_its_own_lanes(atlas, reads, world_size):
    codes = codes_of(atlas)
    alone = Epochs(atlas, codes, batch_size=64, keep=False, num_workers=0)
    options = {"batch_size": 64, "world_size": world_size, "num_workers": 0}
    ranks = [Epochs(atlas, codes, rank=r, room=room(), **options) for r in range(world_size)]
    for epoch in range(3):
        parts = zip(*(list(epochs(epoch)) for epochs in ranks), strict=True)
        for whole, mine in zip(alone(epoch), parts, strict=True):
            assert sorted(torch.cat([m.rows for m in mine]).tolist()) == sorted(whole.rows.tolist())
            for m in mine:
                np.testing.assert_array_equal(
                    m.counts.to_dense(), alone._atlas.read_rows(m.rows.numpy()).to_dense()
                )
    held = [epochs._on_device.nbytes for epochs in ranks]
    every = atlas.read_rows(slice(None))
    assert sum(held) == every.indices.nbytes + every.data.nbytes
    reads.clear()
    for epochs in ranks:
        list(epochs(7))
    assert reads == []


def test_counts_that_do_not_fit_are_read_as_ever_and_it_is_said(atlas, caplog, reads):
    n_bytes = int(atlas.bytes_per_row * N)
    with caplog.at_level(logging.INFO, "atlasvi"):
        small, large = room(n_bytes - 1), room(n_bytes + 1)
        assert Epochs(atlas, keep=False, room=small).kept == ""
        assert Epochs(atlas, room=small).kept == "in memory"
        assert Epochs(atlas, room=large).kept == "on cpu"
        # Epochs that share the room share it.
        assert large.n_bytes == 1 and Epochs(atlas, keep=False, room=large).kept == ""
    said = [record.getMessage() for record in caplog.records]
    assert "do not fit into the 0 MB that are free for them on cpu" in said[0]
    assert any("and stay there once they are read" in line for line in said)


def test_counts_larger_than_estimated_are_let_go_of_and_it_is_said(atlas, caplog, monkeypatch, reads):
    monkeypatch.setattr(Atlas, "bytes_per_row", 20.0)
    place = room(20 * N + 2_000)
    codes = codes_of(atlas)
    here, fresh = Epochs(atlas, codes, room=place), Epochs(atlas, codes, keep=False)
    for epoch in range(2):
        same(here(epoch), fresh(epoch))
    assert here.kept == "" and place.n_bytes == 20 * N + 2_000
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "the counts are larger than was estimated and do not fit on cpu: they are read in every epoch"
    ]


def test_what_goes_to_a_gpu_goes_by_page_locked_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    held = OnDevice(room(), 1_000, 3, 4, pin_memory=True)
    block = CSR.from_scipy(sp.csr_matrix([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]]))
    unit = Unit(0, 0, 0, 3, 3)
    assert not held.holds([unit]) and not held.holds([])
    assert held.put(0, block) and held.holds([unit])
    block.data.zero_()  # what is held is a copy
    taken = held.take(np.zeros(4, np.int64), np.array([2, 0, 1, 0]))
    assert taken.to_dense().tolist() == [[3, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0], [0, 1, 0, 2]]
    assert held.take(*np.zeros((2, 0), np.int64)).shape == (0, 4)
    assert len(pinned) == 4


def test_a_matrix_on_a_device_is_not_pinned_and_whole_not_looked_into():
    there = CSR(*(torch.zeros(3, dtype=torch.int64, device="meta") for _ in range(3)), 5)
    assert there.pin_memory() is there and there.row_range(0, 2) is there
