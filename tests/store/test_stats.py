"""Statistics of an atlas, highly variable genes and filters: against dense arithmetic and scanpy.

`scanpy.npz` is what `benchmarks/peers/scanpy_fixtures.py` wrote, run with scanpy 1.11.5.
"""

import logging
import statistics as exact
import sys
import tracemalloc
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlasvi.errors import CellsError, GenesError, ObsError, OptionError
from atlasvi.models.data import library_moments
from atlasvi.store import variable
from atlasvi.store.atlas import Atlas
from atlasvi.store.base import STRING, Source
from atlasvi.store.fields import register, resolve
from atlasvi_kernels import CSR
from tests.strategies import count_matrices

FIXTURE = Path(__file__).parents[1] / "oracle" / "fixtures" / "scanpy.npz"
CASES = {
    "whole": {"n_top_genes": 40},
    "batches": {"n_top_genes": 40, "batch_key": "batch"},
    "paper": {"n_top_genes": 40, "batch_key": "batch", "flavor": "seurat_v3_paper"},
    "wide": {"n_top_genes": 90, "batch_key": "batch", "span": 0.7},
}


class Cut(Atlas):
    """An atlas whose blocks have the sizes given, over and over."""

    def __init__(self, source, sizes):
        super().__init__(source)
        self.sizes = sizes

    def iter_blocks(self, positions=None, columns=None, *, num_workers=None, memory_budget=None, client=None):
        start, k = 0, 0
        while start < self.n_obs:
            stop = min(start + self.sizes[k % len(self.sizes)], self.n_obs)
            yield self.read_rows(slice(start, stop)), np.arange(start, stop)
            start, k = stop, k + 1


def cut(adata, sizes):
    return Cut(Atlas.from_anndata(adata)._source, sizes)


def with_batches(matrix, n_batch=3):
    batch = np.arange(matrix.shape[0]) % n_batch
    obs = pd.DataFrame({"batch": [f"b{b}" for b in batch]}, index=[f"c{i}" for i in range(len(batch))])
    var = pd.DataFrame(index=[f"g{g}" for g in range(matrix.shape[1])])
    return anndata.AnnData(matrix, obs=obs, var=var)


def same(one, other):
    """Equal to the last bit."""
    for name in ("mean", "variance", "n_cells", "total_counts", "n_genes"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), name
    assert one.library == other.library
    assert (one.batches, one.batch_cells) == (other.batches, other.batch_cells)
    assert one.shares.keys() == other.shares.keys()
    assert all(one.shares[name].tobytes() == other.shares[name].tobytes() for name in one.shares)


# --- statistics -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count_matrices(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_statistics_are_those_of_the_dense_matrix(matrix, sizes):
    adata = with_batches(matrix)
    mask = np.arange(matrix.shape[1]) % 2 == 0
    found = cut(adata, sizes).statistics(batch_key="batch", gene_sets={"even": mask})
    # As Python integers, which do not overflow.
    dense = matrix.toarray().astype(object)
    dense = np.vectorize(int, otypes=[object])(dense)
    np.testing.assert_allclose(found.mean, [exact.mean(gene) for gene in dense.T.tolist()], rtol=1e-15)
    if len(dense) > 1:
        np.testing.assert_allclose(
            found.variance, [float(exact.variance(gene)) for gene in dense.T.tolist()], rtol=4e-16
        )
    else:
        assert np.isnan(found.variance).all()
    np.testing.assert_array_equal(found.n_cells, (dense > 0).sum(0).astype(int))
    np.testing.assert_array_equal(found.n_genes, (dense > 0).sum(1).astype(int))
    totals = dense.sum(1).astype(int)
    np.testing.assert_array_equal(found.total_counts, totals)
    of_even = dense[:, mask].sum(1).astype(float)
    expected = np.divide(of_even, totals, out=np.zeros(len(totals)), where=totals > 0)
    np.testing.assert_allclose(found.shares["even"], expected, rtol=1e-15)
    assert found.nnz == (dense > 0).sum()
    assert found.density == pytest.approx(found.nnz / dense.size)
    for b, level in enumerate(found.batches):
        of_batch = totals[(adata.obs["batch"] == level).to_numpy()]
        logs = np.log(of_batch[of_batch > 0].astype(float))
        assert found.batch_cells[b] == len(of_batch)
        if len(logs):
            assert found.library.log_mean[b] == pytest.approx(logs.mean(), rel=1e-12, abs=1e-12)
            assert found.library.log_var[b] == pytest.approx(max(logs.var(), 1e-4), rel=1e-9)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count_matrices(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_blocks_do_not_matter_to_the_last_bit(matrix, sizes):
    adata = with_batches(matrix)
    arguments = {"batch_key": "batch", "gene_sets": {"first": "g0"}}
    same(cut(adata, sizes).statistics(**arguments), cut(adata, [10**6]).statistics(**arguments))


def test_workers_and_budgets_do_not_matter_to_the_last_bit(small_atlas):
    one = small_atlas.statistics(batch_key="donor", gene_sets={"tens": "gene-1"}, num_workers=0)
    for workers, budget in ((1, 1), (2, 1 << 16), (4, 1 << 30)):
        other = small_atlas.statistics(
            batch_key="donor", gene_sets={"tens": "gene-1"}, num_workers=workers, memory_budget=budget
        )
        same(one, other)


def test_squares_that_pass_64_bits_are_exact():
    largest = 2**32 - 1
    column = [largest, largest, largest, 0, largest - 5]
    matrix = sp.csr_matrix(np.array([column, [1, 0, 0, 0, 2]]).T.astype(np.float64))
    found = cut(with_batches(matrix, 2), [2]).statistics()
    assert found.variance.tolist() == [float(exact.variance(column)), exact.variance([1, 0, 0, 0, 2])]
    assert found.total_counts.tolist() == [largest + 1, largest, largest, 0, largest - 3]


def test_library_moments_are_what_the_model_uses(small_atlas):
    codes = resolve(register(small_atlas, batch_key="donor"), small_atlas)
    assert small_atlas.statistics(batch_key="donor").library == library_moments(small_atlas, codes, 4)


def test_cell_numbers_are_scanpys(scanpy):
    adata, said = scanpy
    found = Atlas.from_anndata(adata).statistics(gene_sets={"mt": "mt"})
    np.testing.assert_array_equal(found.total_counts, said["qc/total_counts"])
    np.testing.assert_array_equal(found.n_genes, said["qc/n_genes_by_counts"])
    np.testing.assert_allclose(100 * found.shares["mt"], said["qc/pct_counts_mt"], rtol=1e-5)  # it is float32


def test_views_are_counted_as_what_they_show(adata):
    atlas = Atlas.from_anndata(adata)[50:1:-3, ["gene-7", "gene-2"]]
    dense = adata.X.toarray()[50:1:-3][:, [7, 2]]
    found = atlas.statistics()
    np.testing.assert_allclose(found.mean, dense.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(found.total_counts, dense.sum(1))
    assert found.genes.index.tolist() == ["gene-7", "gene-2"]
    assert found.genes["n_cells"].tolist() == (dense > 0).sum(0).tolist()


def test_a_gene_set_is_a_prefix_names_or_a_mask(adata):
    atlas = Atlas.from_anndata(adata)
    names = [name for name in adata.var_names if name.startswith("gene-1")]
    mask = adata.var_names.str.startswith("gene-1")
    found = atlas.statistics(gene_sets={"prefix": "gene-1", "names": names, "mask": mask}).shares
    expected = adata[:, names].X.toarray().sum(1) / adata.X.toarray().sum(1)
    for share in found.values():
        np.testing.assert_allclose(share, expected, rtol=1e-6)


def test_mitochondrial_genes_are_known_in_the_spelling_of_each_species():
    matrix = sp.csr_matrix(np.array([[1, 2, 4, 8]], np.float32))
    for names, share in (
        (["MT-CO1", "MTOR", "A", "B"], 1 / 15),
        (["A", "mt-Nd1", "Mtor", "B"], 2 / 15),
        (["A", "B", "Mt-nd1", "C"], 4 / 15),
    ):
        adata = anndata.AnnData(matrix, var=pd.DataFrame(index=names))
        found = Atlas.from_anndata(adata).statistics(gene_sets={"mt": "mt"})
        assert found.shares["mt"] == pytest.approx([share])


@pytest.mark.parametrize(
    ("genes", "words"),
    [
        ("XY-", ("'XY-'", "'gene-0'", "mask")),
        ("mt", ("'MT-'", "'mt-'")),
        (["gene-1", "TP53"], ("'TP53'", "1 genes")),
        (np.ones(3, bool), ("(3,)", "60")),
        (np.zeros(60, bool), ("no gene",)),
        ([], ("no gene",)),
        ([1.5], ("float64", "prefix")),
    ],
)
def test_a_gene_set_that_does_not_fit_is_named(adata, genes, words):
    with pytest.raises(GenesError) as error:
        Atlas.from_anndata(adata).statistics(gene_sets={"odd": genes})
    assert all(word in str(error.value) for word in ("'odd'", *words))
    assert "\n" not in str(error.value)


def test_what_cannot_be_counted_is_refused(adata):
    atlas = Atlas.from_anndata(adata)
    none = atlas[:0]
    for method in (none.statistics, none.highly_variable_genes, lambda: none.filter(min_genes=1)):
        with pytest.raises(CellsError, match="no cells"):
            method()
    with pytest.raises(ObsError, match=r"donr.*donor"):
        atlas.statistics(batch_key="donr")


class Made(Source):
    """Cells that are made when they are read: 20 counts of 1 in each of ``n``."""

    name, n_vars = "made", 500

    def __init__(self, n):
        self.n = n

    @property
    def shape(self):
        return self.n, self.n_vars

    @property
    def var_names(self):
        return np.array([f"g{g}" for g in range(self.n_vars)], STRING)

    @property
    def obs_names(self):
        raise AssertionError("names of cells are not needed")

    is_checked = True

    def read_rows(self, start, stop):
        n = stop - start
        indices = (np.arange(n * 20) * 7 % self.n_vars).astype(np.uint16)
        return CSR.from_numpy(np.arange(n + 1) * 20, indices, np.ones(n * 20, np.uint8), self.n_vars)


@pytest.mark.parametrize(
    ("method", "per_cell"),
    [
        # Totals 8, genes 4, share 8, code 1; the codes of batches are counted once, in 8 bytes a cell.
        (lambda atlas: atlas.statistics(gene_sets={"some": "g1"}), 12 + 8 + 1 + 8),
        # What is kept: a flag for each cell and the rows of the view, 8 bytes, made in two steps.
        (lambda atlas: atlas.filter(min_counts=20, max_counts=20), 1 + 8 + 8),
    ],
)
def test_memory_grows_by_the_bytes_that_are_said(method, per_cell):
    peaks = []
    for n in (20_000, 20_000, 320_000):  # the first compiles
        atlas = Atlas(Made(n))
        tracemalloc.start()
        kept = method(atlas)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del kept
    assert peaks[2] - peaks[1] < 300_000 * per_cell * 1.05 + (1 << 20)


# --- filters ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count_matrices(dtypes=("uint8", "float32")),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "min_counts": st.integers(0, 300), "max_counts": st.integers(300, 3000),
            "min_genes": st.integers(0, 4), "max_genes": st.integers(4, 20),
            "max_share": st.floats(0, 1).map(lambda share: {"few": share}),
        },
    ),
)  # fmt: skip
def test_a_filter_keeps_the_cells_that_pass(matrix, sizes, limits):
    dense = matrix.toarray().astype(float)
    total, n_genes = dense.sum(1), (dense > 0).sum(1)
    share = dense[:, ::3].sum(1) / np.maximum(total, 1)
    keep = (total >= limits.get("min_counts", 0)) & (total <= limits.get("max_counts", np.inf))
    keep &= (n_genes >= limits.get("min_genes", 0)) & (n_genes <= limits.get("max_genes", np.inf))
    keep &= share <= limits.get("max_share", {"few": 1})["few"]
    atlas = cut(with_batches(matrix), sizes)
    sets = {"few": np.arange(matrix.shape[1]) % 3 == 0} if "max_share" in limits else None
    if not limits:
        with pytest.raises(OptionError, match="nothing to filter by"):
            atlas.filter()
    elif not keep.any():
        with pytest.raises(CellsError, match="no cell"):
            atlas.filter(**limits, gene_sets=sets)
    else:
        passed = atlas.filter(**limits, gene_sets=sets)
        np.testing.assert_array_equal(passed.row_numbers, np.flatnonzero(keep))
        np.testing.assert_array_equal(passed.read_rows(slice(None)).to_dense().numpy(), dense[keep])


def test_a_filter_says_how_many_failed_what(small_atlas, adata, caplog):
    dense = adata.X.toarray()
    share = dense[:, [1, *range(10, 20)]].sum(1) / dense.sum(1)
    few, high = int((dense.sum(1) < 60).sum()), int((share > 0.25).sum())
    assert few and high
    with caplog.at_level(logging.INFO, logger="atlasvi"):
        passed = small_atlas.filter(
            min_counts=60, max_share={"ones": 0.25}, gene_sets={"ones": "gene-1"}, num_workers=1
        )
    assert f"keeps {passed.n_obs} of 300 cells" in caplog.text
    assert f"{few} have fewer than 60 counts" in caplog.text
    assert f"{high} have a share of 'ones' above 0.25" in caplog.text
    assert passed.n_obs == ((dense.sum(1) >= 60) & (share <= 0.25)).sum()


def test_filters_of_views_compose(adata):
    atlas = Atlas.from_anndata(adata)
    view = atlas[::-2, adata.var_names[:30]].filter(min_counts=20).filter(max_genes=15)
    dense = adata.X.toarray()[::-2, :30]
    keep = (dense.sum(1) >= 20) & ((dense > 0).sum(1) <= 15)
    assert 0 < keep.sum() < len(keep)
    np.testing.assert_array_equal(view.row_numbers, np.arange(300)[::-2][keep])
    assert view.shape == (keep.sum(), 30)
    assert view.obs.index.tolist() == adata.obs_names[::-2][keep].tolist()


def test_a_filter_that_all_pass_leaves_the_atlas_whole(small_atlas):
    assert small_atlas.filter(min_counts=0).is_whole


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, OptionError, ("nothing to filter by",)),
        ({"min_counts": -1}, OptionError, ("min_counts=-1",)),
        ({"max_genes": float("nan")}, OptionError, ("max_genes=nan",)),
        ({"min_genes": 9, "max_genes": 3}, OptionError, ("min_genes=9", "max_genes=3")),
        ({"max_share": {"mt": 0.2}}, GenesError, ("'mt'", "'MT-'")),
        ({"max_share": {"mt": 20}}, OptionError, ("'mt'", "20", "0.2 is 20 %")),
        ({"max_share": {"ribo": 0.1}}, OptionError, ("'ribo'", "gene_sets", "'mt'")),
        ({"min_counts": 1, "gene_sets": {"x": "gene"}}, OptionError, ("'x'", "max_share")),
        ({"min_counts": 10**7}, CellsError, ("300 have fewer than 10,000,000 counts", "loosen")),
    ],
)
def test_a_filter_that_cannot_be_says_why(adata, arguments, error, words):
    with pytest.raises(error) as caught:
        Atlas.from_anndata(adata).filter(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


# --- highly variable genes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scanpy():
    """The cells of the fixture, and what scanpy says of them."""
    with np.load(FIXTURE) as file:
        said = dict(file)
    obs = pd.DataFrame({"batch": pd.Categorical(said["batch"])}, index=[f"c{i}" for i in range(300)])
    var = pd.DataFrame(index=said["genes"])
    return anndata.AnnData(sp.csr_matrix(said["counts"].astype(np.float32)), obs=obs, var=var), said


def tied(said, by_batch):
    """Genes whose mean and variance in one of the batches are those of another gene."""
    found = np.zeros(len(said["genes"]), bool)
    for level in np.unique(said["batch"]) if by_batch else [None]:
        counts = said["counts"][(said["batch"] == level) | (level is None)].astype(int)
        moments = np.stack([counts.sum(0), (counts**2).sum(0)])
        _, inverse, n = np.unique(moments, axis=1, return_inverse=True, return_counts=True)
        found |= n[inverse] > 1
    assert found.mean() < 0.5
    return found


@pytest.mark.parametrize("case", CASES)
def test_highly_variable_genes_are_scanpys(scanpy, case):
    pytest.importorskip("skmisc")
    adata, said = scanpy
    found = cut(adata, [37, 5]).highly_variable_genes(**CASES[case])
    columns = {name.partition("/")[2] for name in said if name.startswith(f"{case}/")}
    assert set(found.columns) == columns
    assert found.index.tolist() == adata.var_names.tolist()
    np.testing.assert_array_equal(found["highly_variable"], said[f"{case}/highly_variable"])
    assert found["highly_variable"].sum() == CASES[case]["n_top_genes"]
    for column in columns - {"highly_variable"}:
        # Which of two genes that tie comes first, scanpy leaves to rounding and to an unstable sort.
        kept = ~tied(said, "batch_key" in CASES[case]) if column == "highly_variable_rank" else slice(None)
        np.testing.assert_allclose(found[column][kept], said[f"{case}/{column}"][kept], rtol=1e-6, atol=1e-12)


def test_highly_variable_genes_do_not_depend_on_blocks(scanpy):
    pytest.importorskip("skmisc")
    adata, _ = scanpy
    one = cut(adata, [300]).highly_variable_genes(40, batch_key="batch")
    other = Atlas.from_anndata(adata).highly_variable_genes(40, batch_key="batch", num_workers=2)
    third = cut(adata, [1, 7]).highly_variable_genes(40, batch_key="batch")
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    pd.testing.assert_frame_equal(one, third, check_exact=True)


def test_highly_variable_genes_of_a_view_are_those_of_the_same_cells(scanpy):
    pytest.importorskip("skmisc")
    adata, _ = scanpy
    rows = np.flatnonzero(adata.obs["batch"] != "lane1")
    view = Atlas.from_anndata(adata)[rows]
    copied = Atlas.from_anndata(adata[rows].copy())
    pd.testing.assert_frame_equal(
        view.highly_variable_genes(30, batch_key="batch"), copied.highly_variable_genes(30, batch_key="batch")
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"flavor": "cell_ranger"}, OptionError, ("'cell_ranger'", "'seurat_v3'")),
        ({"n_top_genes": 0}, OptionError, ("n_top_genes=0",)),
        ({"span": 0}, OptionError, ("span=0",)),
        ({"batch_key": "lone"}, CellsError, ("'b'", "1 cell")),
        ({"batch_key": "btch"}, ObsError, ("'btch'", "'batch'")),
    ],
)
def test_highly_variable_genes_that_cannot_be_say_why(scanpy, arguments, error, words):
    pytest.importorskip("skmisc")
    adata, _ = scanpy
    adata = adata.copy()
    adata.obs["lone"] = ["b"] + ["a"] * 299
    with pytest.raises(error) as caught:
        Atlas.from_anndata(adata).highly_variable_genes(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_too_few_genes_to_fit_are_an_error_with_a_remedy(scanpy):
    pytest.importorskip("skmisc")
    adata, _ = scanpy
    with pytest.raises(OptionError, match=r"4 genes that vary.*span"):
        Atlas.from_anndata(adata[:, 20:24].copy()).highly_variable_genes(2)


def test_without_scikit_misc_the_remedy_is_said(adata, monkeypatch):
    monkeypatch.setitem(sys.modules, "skmisc.loess", None)
    with pytest.raises(OptionError, match=r"atlasvi\[hvg\]"):
        Atlas.from_anndata(adata).highly_variable_genes(2)


def test_genes_that_tie_are_taken_in_their_order():
    frame = pd.DataFrame(index=list("abcdef"))
    normed = np.array([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0]])
    found = variable._ranked(frame, normed, 4, "seurat_v3", with_batches=False)
    assert found.index[found["highly_variable"]].tolist() == ["a", "b", "c", "e"]
