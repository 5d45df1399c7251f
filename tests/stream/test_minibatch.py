"""Minibatches: the counts, the codes and the numbers of the same cells."""

import threading

import anndata
import numpy as np
import pytest
import torch
from atlasvi_kernels import RowPool

from atlasvi.errors import CellsError, GenesError, OptionError
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import register, resolve
from atlasvi.stream import Epochs, pack, stream_blocks
from atlasvi.stream.minibatch import gather
from atlasvi.stream.plan import plan_epoch
from atlasvi.stream.read import read_units


def minibatches(atlas, codes, **options):
    return Epochs(atlas, codes, **options)()


@pytest.fixture
def atlas(adata):
    return Atlas.from_anndata(adata)


@pytest.fixture
def codes(atlas):
    fields = register(
        atlas,
        batch_key="batch",
        labels_key="cell_type",
        size_factor_key="size_factor",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["percent_mito", "age"],
    )
    return resolve(fields, atlas)


@pytest.mark.parametrize("num_workers", (0, 2))
def test_everything_in_a_minibatch_is_of_the_same_cells(adata, atlas, codes, num_workers):
    seen = []
    for mb in minibatches(atlas, codes, batch_size=32, seed=1, num_workers=num_workers):
        rows = mb.rows.numpy()
        obs = adata.obs.iloc[rows]
        assert (mb.counts.to_scipy() != adata.X[rows]).nnz == 0
        np.testing.assert_array_equal(mb.batch_index, obs["batch"].cat.codes)
        np.testing.assert_array_equal(mb.labels, obs["cell_type"].cat.codes)
        np.testing.assert_array_equal(mb.cat_covs, obs[["donor"]].apply(lambda c: c.cat.codes))
        np.testing.assert_array_equal(mb.cont_covs, obs[["percent_mito", "age"]].astype(np.float32))
        np.testing.assert_array_equal(mb.size_factor, obs["size_factor"].astype(np.float32))
        seen.extend(rows)
    assert sorted(seen) == list(range(adata.n_obs))
    assert seen != list(range(adata.n_obs))


def test_types_are_those_that_minibatch_promises(atlas, codes):
    mb = next(minibatches(atlas, codes, num_workers=0))
    for name in ("rows", "batch_index", "labels", "cat_covs"):
        assert getattr(mb, name).dtype == torch.int64, name
    for name in ("cont_covs", "size_factor"):
        assert getattr(mb, name).dtype == torch.float32, name
    assert (mb.cat_covs.shape, mb.cont_covs.shape) == ((128, 1), (128, 2))


def test_without_registered_columns_codes_are_zero_and_covariates_empty(atlas):
    mb = next(minibatches(atlas, resolve(register(atlas), atlas), num_workers=0))
    assert not mb.batch_index.any()
    assert not mb.labels.any()
    assert (mb.cat_covs.shape, mb.cont_covs.shape, mb.size_factor) == ((128, 0), (128, 0), None)


def test_genes_come_in_the_models_order(adata, atlas):
    fields = register(atlas[:, ["gene-7", "gene-2", "gene-31"]])
    for mb in minibatches(atlas, resolve(fields, atlas), batch_size=50, num_workers=2):
        expected = adata[:, ["gene-7", "gene-2", "gene-31"]].X[mb.rows.numpy()]
        assert mb.counts.n_vars == 3
        assert (mb.counts.to_scipy() != expected).nnz == 0


def test_a_training_split_is_all_that_comes(adata, atlas, codes):
    split = np.sort(np.random.default_rng(0).choice(300, 200, replace=False))
    rows = [mb.rows.numpy() for mb in minibatches(atlas, codes, positions=split, num_workers=2)]
    assert [len(r) for r in rows] == [128, 72]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), split)
    for mb in minibatches(atlas, codes, positions=split, num_workers=0):
        assert (mb.counts.to_scipy() != adata.X[mb.rows.numpy()]).nnz == 0


def test_codes_of_a_view_belong_to_the_cells_of_the_view(adata, atlas):
    chosen = np.random.default_rng(1).permutation(300)[:120]
    view = atlas[chosen]
    codes = resolve(register(view, batch_key="batch"), view)
    for mb in minibatches(view, codes, batch_size=40, num_workers=2):
        assert np.isin(mb.rows, chosen).all()
        np.testing.assert_array_equal(mb.batch_index, adata.obs["batch"].cat.codes.iloc[mb.rows])
        assert (mb.counts.to_scipy() != adata.X[mb.rows.numpy()]).nnz == 0


@pytest.mark.parametrize("start", (0, 1, 4))
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 3), (2, 3)])
def test_minibatches_are_those_of_the_plan_from_any_on_and_for_any_reader(
    adata, atlas, start, rank, world_size
):
    plan = plan_epoch(300, batch_size=64, block_rows=10, n_lanes=8, seed=0, epoch=0)
    lanes = range(rank, 8, world_size)
    units, read_rows = plan.schedule(lanes, start), []

    def read(a, b):
        read_rows.extend(range(a, b))
        return atlas.read_rows(slice(a, b))

    pieces = list(gather(read_units(read, units, num_workers=2), units, RowPool(60), plan, lanes, start))
    assert len(pieces) == 5 - start
    for i, (counts, positions) in enumerate(pieces, start):
        np.testing.assert_array_equal(positions, plan.positions(i, lanes))
        assert (counts.to_scipy() != adata.X[positions]).nnz == 0
    # What other readers have, and what came before, is not read.
    needed = {int(p) // 10 for i in range(start, 5) for p in plan.positions(i, lanes)}
    assert {row // 10 for row in read_rows} == needed


def test_resuming_and_sharing_are_open_to_a_stream(atlas):
    whole = [rows for _, rows in atlas.stream(32, seed=5, epoch=1)]
    tail = [rows for _, rows in atlas.stream(32, seed=5, epoch=1, start=4)]
    for one, other in zip(tail, whole[4:], strict=True):
        np.testing.assert_array_equal(one, other)
    shared = [list(atlas.stream(32, seed=5, epoch=1, rank=r, world_size=2)) for r in range(2)]
    for i, rows in enumerate(whole):
        np.testing.assert_array_equal(np.sort(np.concatenate([s[i][1] for s in shared])), np.sort(rows))
    for wrong in ({"start": 99}, {"rank": 2, "world_size": 2}, {"world_size": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            atlas.stream(32, **wrong)


def test_breaking_out_of_the_loop_leaves_no_threads(atlas, codes):
    for make in (
        lambda: minibatches(atlas, codes, batch_size=8, num_workers=2),
        lambda: atlas.stream(batch_size=8, num_workers=2),
        lambda: stream_blocks(atlas, num_workers=2),
    ):
        for _ in make():
            break
        assert not [t for t in threading.enumerate() if t.name.startswith(("atlasvi-read", "atlasvi-decode"))]


def test_an_exception_in_the_loop_leaves_no_threads(atlas, codes):
    def train():
        for _ in minibatches(atlas, codes, batch_size=8, num_workers=2):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert not [t for t in threading.enumerate() if t.name.startswith(("atlasvi-read", "atlasvi-decode"))]


@pytest.mark.parametrize("num_workers", (0, 2))
def test_blocks_are_all_cells_in_order(adata, atlas, num_workers):
    pieces = list(stream_blocks(atlas, num_workers=num_workers, memory_budget=1 << 20))
    np.testing.assert_array_equal(np.concatenate([p for _, p in pieces]), np.arange(300))
    some = np.array([5, 250, 7])
    (counts, positions), *rest = atlas.iter_blocks(some, ["gene-3", "gene-0"], num_workers=num_workers)
    assert rest == []
    np.testing.assert_array_equal(positions, some)
    np.testing.assert_array_equal(counts.to_dense(), adata[some, ["gene-3", "gene-0"]].X.toarray())


def test_arguments_are_checked_before_the_first_minibatch(atlas, codes):
    with pytest.raises(OptionError, match="batch_size=0"):
        minibatches(atlas, codes, batch_size=0)
    with pytest.raises(CellsError, match="positions 0 to 300 asked of 300 cells"):
        minibatches(atlas, codes, positions=np.arange(301))
    with pytest.raises(CellsError, match="vector of integers"):
        minibatches(atlas, codes, positions=np.array([0.5]))
    with pytest.raises(CellsError, match="codes are for 300 cells but the atlas has 20"):
        minibatches(atlas[:20], codes)
    with pytest.raises(GenesError, match="codes name gene 59 but the atlas has 10"):
        minibatches(atlas[:, :10], codes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_pinning_without_a_device_is_refused_and_not_done_by_itself(atlas, codes):
    with pytest.raises(OptionError, match="pin_memory=True needs a CUDA device"):
        minibatches(atlas, codes, pin_memory=True)
    assert not next(minibatches(atlas, codes, num_workers=0)).rows.is_pinned()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_minibatches_are_pinned_where_there_is_a_device(atlas, codes):
    mb = next(minibatches(atlas, codes, num_workers=1))
    tensors = (mb.counts.data, mb.counts.indices, mb.counts.indptr, mb.rows, mb.batch_index, mb.cont_covs)
    assert all(tensor.is_pinned() for tensor in tensors)
    assert not next(minibatches(atlas, codes, pin_memory=False)).rows.is_pinned()


def test_pack_widens_codes_and_takes_them_by_row(adata, atlas, codes):
    at = np.array([9, 3])
    mb = pack(atlas.read_rows(at), at, codes, 1000 + at)
    assert mb.rows.tolist() == [1009, 1003]
    assert mb.labels.tolist() == adata.obs["cell_type"].cat.codes.iloc[at].tolist()


def test_an_empty_atlas_gives_no_minibatches():
    empty = Atlas.from_anndata(anndata.AnnData(np.zeros((0, 4), np.float32)))
    assert list(empty.stream()) == []
