"""Each format that counts come in, written by its own library and read through the one interface."""

import gzip
import threading

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import zarr

from atlasvi.errors import CorruptError, NotAnAtlasError, OptionError, StoreError
from atlasvi.store.sources import OtherSource, open_source
from atlasvi.store.spill import Spill


def small(seed=0, n_obs=37, n_vars=23):
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(0.7, (n_obs, n_vars)).astype(np.float32))
    adata = anndata.AnnData(counts)
    adata.obs_names = [f"AÄC-{i}-with-a-long-name" for i in range(n_obs)]
    adata.var_names = [f"gene-{g}" for g in range(n_vars)]
    adata.obs["kind"] = pd.Categorical(rng.choice(["T", "B"], n_obs))
    adata.obs["depth"] = rng.normal(size=n_obs)
    adata.obs["ok"] = rng.random(n_obs) < 0.5
    adata.obs["age"] = pd.array([None, *range(n_obs - 1)], dtype="Int64")
    adata.var["gene_ids"] = [f"id{g}" for g in range(n_vars)]
    adata.layers["double"] = counts * 2
    adata.raw = adata.copy()
    return adata


def write_zarr(adata, path, zarr_format):
    with anndata.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
        group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
        anndata.io.write_elem(group, "/", adata)


def write_10x(adata, path, *, antibodies=0, legacy=False):
    """As Cell Ranger does: genes x cells by columns."""
    n = adata.n_vars
    by_cell = adata.X.tocsr()
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38" if legacy else "matrix")
        group["barcodes"] = np.char.encode(adata.obs_names.to_numpy(str), "utf-8")
        group["data"], group["indices"] = by_cell.data.astype("i4"), by_cell.indices.astype("i8")
        group["indptr"], group["shape"] = by_cell.indptr.astype("i8"), np.array([n, adata.n_obs])
        features = group if legacy else group.create_group("features")
        features["genes" if legacy else "id"] = adata.var["gene_ids"].to_numpy("S")
        features["gene_names" if legacy else "name"] = adata.var_names.to_numpy("S")
        if not legacy:
            kinds = ["Gene Expression"] * (n - antibodies) + ["Antibody Capture"] * antibodies
            features["feature_type"] = np.array(kinds, "S")


def write_mtx(adata, folder, *, gz=True, by_cell=True, features="features.tsv", seed=0):
    """A folder as Cell Ranger writes it, with the entries by cell or in random order."""
    folder.mkdir()
    coo = adata.X.T.tocoo()
    order = np.lexsort((coo.row, coo.col)) if by_cell else np.random.default_rng(seed).permutation(coo.nnz)
    lines = [f"{coo.row[k] + 1} {coo.col[k] + 1} {int(coo.data[k])}" for k in order]
    head = [
        "%%MatrixMarket matrix coordinate integer general",
        "% made by a test",
        f"{coo.shape[0]} {coo.shape[1]} {coo.nnz}",
    ]
    tables = {
        "matrix.mtx": [*head, *lines],
        "barcodes.tsv": list(adata.obs_names),
        features: [
            f"{i}\t{name}\tGene Expression"
            for i, name in zip(adata.var["gene_ids"], adata.var_names, strict=True)
        ],
    }
    for name, content in tables.items():
        text = "".join(line + "\n" for line in content)
        if gz:
            with gzip.open(folder / f"{name}.gz", "wt") as file:
                file.write(text)
        else:
            (folder / name).write_text(text)


def backed(adata, tmp_path):
    adata.write_h5ad(tmp_path / "backed.h5ad")
    return anndata.read_h5ad(tmp_path / "backed.h5ad", backed="r")


def dask_backed(adata, tmp_path):
    """What a lazy AnnData holds: Dask arrays of sparse blocks."""
    import dask.array as da

    def lazy(matrix):
        blocks = [
            da.from_array(matrix[a : a + 10], asarray=False, chunks=-1) for a in range(0, adata.n_obs, 10)
        ]
        return da.concatenate(blocks)

    return anndata.AnnData(
        lazy(adata.X), obs=adata.obs, var=adata.var, layers={"double": lazy(adata.layers["double"])}
    )


def in_file(write):
    def make(adata, tmp_path):
        path = tmp_path / "input"
        write(adata, path)
        return path

    return make


FORMATS = {
    "h5ad": in_file(lambda adata, path: adata.write_h5ad(path)),
    "h5ad gzip": in_file(lambda adata, path: adata.write_h5ad(path, compression="gzip")),
    "zarr v2": in_file(lambda adata, path: write_zarr(adata, path, 2)),
    "zarr v3": in_file(lambda adata, path: write_zarr(adata, path, 3)),
    "10x": in_file(write_10x),
    "10x legacy": in_file(lambda adata, path: write_10x(adata, path, legacy=True)),
    "mtx": in_file(write_mtx),
    "mtx plain": in_file(lambda adata, path: write_mtx(adata, path, gz=False, features="genes.tsv")),
    "mtx unsorted": in_file(lambda adata, path: write_mtx(adata, path, by_cell=False)),
    "memory": lambda adata, _: adata,
    "backed": backed,
    "dask": dask_backed,
}


def lazily_read(adata, tmp_path):
    pytest.importorskip("xarray", reason="a lazy AnnData needs xarray")
    write_zarr(adata, tmp_path / "lazy.zarr", 3)
    return anndata.experimental.read_lazy(zarr.open_group(tmp_path / "lazy.zarr", mode="r"))


@pytest.mark.parametrize("make", [*FORMATS.values(), lazily_read], ids=[*FORMATS, "lazy"])
def test_every_format_reads_the_same(make, tmp_path):
    adata = small()
    source = open_source(make(adata, tmp_path))
    try:
        assert source.shape == adata.shape
        for start, stop in ((0, 37), (0, 0), (5, 6), (11, 29), (36, 37)):
            np.testing.assert_array_equal(
                source.read_rows(start, stop).to_scipy().toarray(), adata.X[start:stop].toarray()
            )
        assert source.obs_names.dtype == np.dtypes.StringDType()
        assert source.obs_names.tolist() == list(adata.obs_names)
        assert source.read_names(3, 9).tolist() == list(adata.obs_names[3:9])
        assert source.var_names.tolist() == list(adata.var_names)
        assert np.asarray(source.var_column("gene_ids")).tolist() == list(adata.var["gene_ids"])
        if source.indptr is not None:
            assert source.indptr.dtype == np.int64
            np.testing.assert_array_equal(source.indptr, adata.X.indptr)
        with pytest.raises(KeyError):
            source.var_column("nothing of that name")
    finally:
        source.close()


ANNDATA = {name: FORMATS[name] for name in ("h5ad", "zarr v2", "zarr v3", "memory", "backed")}
ANNDATA["lazy"] = lazily_read


@pytest.mark.parametrize("make", ANNDATA.values(), ids=ANNDATA)
def test_columns_keep_their_kind(make, tmp_path):
    adata = small()
    source = open_source(make(adata, tmp_path))
    # xarray, which holds a lazy table, has an order of its own.
    assert source.obs_keys == list(adata.obs.columns) or make is lazily_read
    assert set(source.obs_keys) == set(adata.obs.columns)
    assert isinstance(source.obs_column("kind"), pd.Categorical)
    for key in adata.obs:
        pd.testing.assert_series_equal(
            pd.Series(source.obs_column(key), index=adata.obs_names, name=key), adata.obs[key]
        )
    source.close()


@pytest.mark.parametrize("make", ANNDATA.values(), ids=ANNDATA)
def test_counts_are_taken_from_a_layer_or_from_raw(make, tmp_path):
    adata = small()
    raw = adata.raw.to_adata()
    adata.X = adata.X.multiply(0.3).tocsr()
    adata = adata[:, ::2].copy()
    made = make(adata, tmp_path)
    double, from_raw = open_source(made, "double"), open_source(made, "raw")
    np.testing.assert_array_equal(
        double.read_rows(2, 9).to_scipy().toarray(), adata.layers["double"][2:9].toarray()
    )
    assert (double.place, from_raw.place) == ("layers['double']", "raw.X")
    np.testing.assert_array_equal(from_raw.read_rows(2, 9).to_scipy().toarray(), raw.X[2:9].toarray())
    assert from_raw.var_names.tolist() == list(raw.var_names)
    assert set(double.extras().elsewhere) == {"X", "raw"}
    with pytest.raises(OptionError, match=r"no layer 'spliced'.*'double'"):
        open_source(made, "spliced")
    double.close()
    from_raw.close()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_lazy_matrix_by_genes_is_refused_and_its_file_ingested(tmp_path, suffix):
    pytest.importorskip("xarray", reason="a lazy AnnData needs xarray")
    adata, path = small(), tmp_path / f"csc.{suffix}"
    adata.X = adata.X.tocsc()
    adata.write_h5ad(path) if suffix == "h5ad" else write_zarr(adata, path, 3)
    lazy = anndata.experimental.read_lazy(path if suffix == "h5ad" else zarr.open_group(path, mode="r"))
    with pytest.raises(OptionError, match=r"AnnData X is lazy and stored as csc_matrix, by genes.*ingest\("):
        open_source(lazy)
    np.testing.assert_array_equal(
        open_source(lazy, "double").read_rows(3, 9).to_scipy().toarray(),
        adata.layers["double"][3:9].toarray(),
    )
    source = open_source(path)
    np.testing.assert_array_equal(source.read_rows(4, 20).to_scipy().toarray(), adata.X[4:20].toarray())
    source.close()


def test_blocks_of_cells_that_are_stored_by_genes_are_read(tmp_path):
    """As Dask may hold them; each block of cells is then read by itself."""
    adata = small()
    lazy = dask_backed(adata, tmp_path).X.map_blocks(sp.csc_matrix, meta=sp.csc_matrix((0, 0), dtype="f4"))
    source = open_source(anndata.AnnData(lazy, obs=adata.obs, var=adata.var))
    np.testing.assert_array_equal(source.read_rows(4, 20).to_scipy().toarray(), adata.X[4:20].toarray())


def test_a_layer_called_raw_wins_over_raw():
    adata = small()
    adata.layers["raw"] = adata.X * 3
    assert open_source(adata, "raw").place == "layers['raw']"


@pytest.mark.parametrize("dense", [np.asarray, sp.csc_matrix], ids=["dense", "csc"])
def test_dense_and_by_column_in_memory(dense):
    adata = small()
    other = anndata.AnnData(dense(adata.X.toarray()), obs=adata.obs, var=adata.var)
    np.testing.assert_array_equal(
        open_source(other).read_rows(4, 20).to_scipy().toarray(), adata.X[4:20].toarray()
    )


@pytest.mark.parametrize("make", [FORMATS["h5ad"], FORMATS["zarr v3"]], ids=["h5ad", "zarr"])
def test_dense_on_disk_is_read_by_rows(make, tmp_path):
    adata = small()
    adata.X = adata.X.toarray()
    source = open_source(make(adata, tmp_path))
    np.testing.assert_array_equal(source.read_rows(4, 20).to_scipy().toarray(), adata.X[4:20])
    source.close()


def test_other_features_of_10x_are_left_out_and_named(tmp_path):
    adata = small()
    write_10x(adata, tmp_path / "cite.h5", antibodies=4)
    source = open_source(tmp_path / "cite.h5")
    assert source.shape == (37, 19)
    np.testing.assert_array_equal(source.read_rows(3, 30).to_scipy().toarray(), adata.X[3:30, :19].toarray())
    assert source.var_names.tolist() == list(adata.var_names[:19])
    assert source.extras().left_out == ("4 features of type 'Antibody Capture'",)
    source.close()


def test_matrix_market_agrees_with_scipy(tmp_path):
    """scipy's reader is the oracle for our writer of the fixture too."""
    write_mtx(small(), tmp_path / "m", gz=False, by_cell=False)
    source = open_source(tmp_path / "m")
    np.testing.assert_array_equal(
        source.read_rows(0, 37).to_scipy().toarray(),
        scipy.io.mmread(tmp_path / "m" / "matrix.mtx").T.toarray(),
    )
    source.close()


def test_matrix_market_removes_its_temporary_files(tmp_path):
    write_mtx(small(), tmp_path / "m")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    source = open_source(tmp_path / "m", scratch=scratch)
    source.read_rows(0, 3)
    assert any(scratch.iterdir())
    source.close()
    assert not any(scratch.iterdir())


def test_spill_sorts_more_buckets_than_one(tmp_path, monkeypatch):
    monkeypatch.setattr("atlasvi.store.spill.BUCKET_ENTRIES", 50)
    rng = np.random.default_rng(0)
    matrix = sp.random(60, 40, 0.4, "coo", random_state=1)
    spill = Spill(tmp_path, 60, matrix.nnz, np.float64)
    assert spill.n_buckets > 10
    order = rng.permutation(matrix.nnz)
    for part in np.array_split(order, 7):
        spill.add(matrix.row[part].astype(np.int64), matrix.col[part], matrix.data[part])
    csr = matrix.tocsr()
    indices, values = spill.begin_merge(csr.indptr.astype(np.int64))
    for bucket in range(spill.n_buckets):
        spill.merge(bucket)
    np.testing.assert_array_equal(
        sp.csr_matrix((values[...], indices[...].astype("i4"), csr.indptr), shape=csr.shape).toarray(),
        csr.toarray(),
    )
    assert sum(spill.rows_per_bucket()) == 60


@pytest.mark.parametrize("name", ["h5ad", "zarr v3", "mtx", "backed"])
def test_threads_read_at_once(name, tmp_path):
    adata = small()
    source = open_source(FORMATS[name](adata, tmp_path))
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            start, stop = np.sort(rng.integers(0, 38, 2))
            if (source.read_rows(start, stop).to_scipy() != adata.X[start:stop]).nnz:
                wrong.append((start, stop))

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    source.close()


def test_the_count_arrays_of_zarr_go_through_zarrs_and_the_setting_stays(tmp_path):
    before = zarr.config.get("codec_pipeline.path")
    write_zarr(small(), tmp_path / "a.zarr", 3)
    source = open_source(tmp_path / "a.zarr")
    assert zarr.config.get("codec_pipeline.path") == before
    assert type(source._rows._data._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"


class Minimal:
    """Not a `Source`, only shaped like one."""

    name = "mine"

    def __init__(self, adata):
        self.inner = open_source(adata)
        self.shape = adata.shape
        self.obs_names, self.var_names = list(adata.obs_names), list(adata.var_names)

    def read_rows(self, start, stop):
        return self.inner.read_rows(start, stop)


def test_any_object_with_the_interface_will_do():
    adata = small()
    source = open_source(Minimal(adata))
    assert isinstance(source, OtherSource)
    assert source.read_names(2, 4).tolist() == list(adata.obs_names[2:4])
    assert source.obs_keys == [] and source.indptr is None
    np.testing.assert_array_equal(source.read_rows(1, 5).to_scipy().toarray(), adata.X[1:5].toarray())


# --- what is wrong with a file is said in one line


def test_a_missing_file(tmp_path):
    with pytest.raises(StoreError, match=r"no such file or folder: '.*nothing\.h5ad'"):
        open_source(tmp_path / "nothing.h5ad")


def test_an_unknown_format(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StoreError, match=r"table\.csv' is in a format that is not known"):
        open_source(tmp_path / "table.csv")


def test_an_unknown_object():
    with pytest.raises(OptionError, match="from a dict"):
        open_source({})


def test_a_folder_that_is_not_an_atlas(tmp_path):
    with pytest.raises(NotAnAtlasError, match="is not an atlas"):
        open_source(tmp_path)
    zarr.open_group(tmp_path / "z.zarr", mode="w")
    with pytest.raises(NotAnAtlasError, match="not an AnnData"):
        open_source(tmp_path / "z.zarr")


@pytest.mark.parametrize("keep", [0.98, 0.5, 0.1])
def test_a_truncated_h5ad_names_the_file(tmp_path, keep):
    small().write_h5ad(tmp_path / "cut.h5ad")
    whole = (tmp_path / "cut.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CorruptError, match=r"cut\.h5ad.*truncated"):
        open_source(tmp_path / "cut.h5ad")


def test_a_damaged_block_of_an_h5ad_names_file_and_rows(tmp_path):
    adata = small(n_obs=2000)
    adata.write_h5ad(tmp_path / "bad.h5ad", compression="gzip")
    with h5py.File(tmp_path / "bad.h5ad") as file:
        offset = file["X/data"].id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "bad.h5ad").read_bytes())
    content[offset : offset + 200] = bytes(200)
    (tmp_path / "bad.h5ad").write_bytes(bytes(content))
    source = open_source(tmp_path / "bad.h5ad")
    with pytest.raises(CorruptError, match=r"bad\.h5ad' X: rows 0 to 10 cannot be read"):
        source.read_rows(0, 10)
    source.close()


def test_offsets_and_columns_that_cannot_be(tmp_path):
    small().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X/indices"][5] = 23
    source = open_source(tmp_path / "a.h5ad")
    with pytest.raises(CorruptError, match="a column outside 0 to 22"):
        source.read_rows(0, 37)
    source.close()
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X/indptr"][5] = 10**6
    with pytest.raises(CorruptError, match="indptr"):
        open_source(tmp_path / "a.h5ad")


@pytest.mark.parametrize("what", ["line", "gzip", "short", "index", "barcodes"])
def test_a_damaged_matrix_market_folder(tmp_path, what):
    adata = small()
    write_mtx(adata, tmp_path / "m", gz=what == "gzip")
    folder = tmp_path / "m"
    if what == "gzip":
        content = (folder / "matrix.mtx.gz").read_bytes()
        (folder / "matrix.mtx.gz").write_bytes(content[: len(content) // 2])
    else:
        name = "barcodes.tsv" if what == "barcodes" else "matrix.mtx"
        lines = (folder / name).read_text().splitlines()
        lines = {
            "line": [*lines[:9], "3 spam 4", *lines[10:]], "index": [*lines[:9], "24 1 4", *lines[10:]],
            "short": lines[:-1], "barcodes": lines[:-1],
        }[what]  # fmt: skip
        (folder / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(CorruptError, match=r"matrix\.mtx"):
        source = open_source(folder)
        try:
            source.read_rows(0, 1)
        finally:
            source.close()


def test_matrix_market_without_its_tables(tmp_path):
    write_mtx(small(), tmp_path / "m", gz=False)
    (tmp_path / "m" / "barcodes.tsv").unlink()
    with pytest.raises(StoreError, match=r"no barcodes\.tsv"):
        open_source(tmp_path / "m")


def test_values_that_are_not_numbers(tmp_path):
    adata = small()
    adata.layers["complex"] = adata.X.astype(np.complex64)
    with pytest.raises(OptionError, match="complex64"):
        open_source(adata, "complex").read_rows(0, 2)


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">f4", ">i2", "?"]
)
def test_every_type_of_values(tmp_path, dtype):
    adata = small()
    expected = adata.X.toarray() != 0 if dtype == "?" else adata.X.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        values = file["X/data"][...].astype(dtype)
        del file["X/data"]
        file["X/data"] = values
    source = open_source(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(source.read_rows(0, 37).to_scipy().toarray(), expected)
    source.close()


@pytest.mark.data
def test_real_files_read_as_anndata_reads_them(data_dir):
    path = data_dir / "pbmc_sorted_reference.h5ad"
    adata = anndata.read_h5ad(path)
    source = open_source(path)
    assert (source.read_rows(100, 900).to_scipy() != adata.X[100:900]).nnz == 0
    assert source.obs_names.tolist() == list(adata.obs_names)
    source.close()


def test_half_precision_in_memory_is_read_as_it_is_from_a_file():
    adata = small()
    dense = anndata.AnnData(adata.X.toarray().astype(np.float16), obs=adata.obs, var=adata.var)
    found = open_source(dense).read_rows(0, adata.n_obs).to_scipy()
    np.testing.assert_array_equal(found.toarray(), adata.X.toarray())
