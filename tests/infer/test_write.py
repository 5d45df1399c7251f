"""Latents and expression on disk: AnnData reads them, and nothing is lost on the way."""

import anndata
import h5py
import numpy as np
import pytest

import atlasvi
from atlasvi.errors import CellsError, OptionError, SpaceError, StoreError
from atlasvi.infer import write as write_module
from atlasvi.infer.write import write_expression, write_latent
from atlasvi.models.scvi import SCVI


def quiet(*_):
    pass


@pytest.fixture
def store(adata, tmp_path):
    atlasvi.ingest(adata, tmp_path / "atlas.zarr")
    return tmp_path / "atlas.zarr"


@pytest.fixture
def model(store):
    atlas = atlasvi.open(store)
    SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None)
    model = SCVI(atlas, n_hidden=16, n_latent=3)
    model.train(1, batch_size=64, enable_progress_bar=False)
    return model


def write(model, out, genes=("gene-3", "gene-1"), **options):
    rho = model.expression(genes=list(genes))
    how = {"overwrite": False, "advance": quiet, **options}
    write_expression(rho, model.atlas.read_names, list(genes), out, **how)
    return rho


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_expression_is_an_anndata_with_rho_as_x(model, adata, tmp_path):
    seen = []
    rho = write(model, tmp_path / "rho.zarr", advance=lambda done, note: seen.append(done))
    back = anndata.read_zarr(tmp_path / "rho.zarr")
    np.testing.assert_array_equal(back.X, rho.compute())
    assert back.obs_names.tolist() == adata.obs_names.tolist()
    assert back.var_names.tolist() == ["gene-3", "gene-1"]
    assert seen[-1] == 300


def test_expression_in_many_chunks_is_the_same(model, tmp_path, monkeypatch):
    expected = model.expression().compute()
    monkeypatch.setattr("atlasvi.infer.decode.CHUNK_BYTES", 1)
    rho = write(model, tmp_path / "rho.zarr", genes=model.fields.var_names)
    assert rho.npartitions == 5
    np.testing.assert_allclose(anndata.read_zarr(tmp_path / "rho.zarr").X, expected, rtol=2e-5)


def test_expression_is_replaced_only_when_asked(model, tmp_path):
    out = tmp_path / "rho.zarr"
    write(model, out)
    before = snapshot(out)
    with pytest.raises(StoreError, match="--overwrite"):
        write(model, out, genes=["gene-2"])
    assert snapshot(out) == before
    write(model, out, genes=["gene-2"], overwrite=True)
    assert anndata.read_zarr(out).var_names.tolist() == ["gene-2"]


def test_a_folder_that_is_no_store_is_never_replaced(model, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(StoreError):
            write(model, folder, overwrite=overwrite)
    assert (folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_that_is_cut_off_leaves_what_was_there(overwrite, model, tmp_path, monkeypatch):
    out = tmp_path / "rho.zarr"
    if overwrite:
        write(model, out)
    before = snapshot(tmp_path)

    def stop(done, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(model, out, overwrite=overwrite, advance=stop)
    assert snapshot(tmp_path) == before


def test_a_full_disk_is_named(model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "create_array", full)
    with pytest.raises(SpaceError, match="no space left"):
        write(model, tmp_path / "rho.zarr")
    assert not (tmp_path / "rho.zarr").exists()


def latent(model, out=None, key="X_scVI", atlas=None):
    write_latent(model.latent_blocks(), atlas or model.atlas, 3, out, key, quiet)


def test_latents_go_into_the_store(model, store):
    latent(model)
    latent(model, key="X_again")
    back = anndata.read_zarr(store)
    expected = model.get_latent_representation()
    np.testing.assert_array_equal(back.obsm["X_scVI"], expected)
    np.testing.assert_array_equal(back.obsm["X_again"], expected)
    assert np.isfinite(expected).all()


def test_latents_go_into_an_h5ad_of_the_same_cells(model, adata, tmp_path):
    path = tmp_path / "a.h5ad"
    adata.obsm["X_pca"] = np.ones((300, 2))
    adata.write_h5ad(path)
    latent(model, path)
    latent(model, path)  # again, over itself
    back = anndata.read_h5ad(path)
    np.testing.assert_array_equal(back.obsm["X_scVI"], model.get_latent_representation())
    np.testing.assert_array_equal(back.obsm["X_pca"], np.ones((300, 2)))
    assert (back.X != adata.X).nnz == 0
    with h5py.File(path) as file:
        assert sorted(file["obsm"]) == ["X_pca", "X_scVI"]


def test_latents_of_other_cells_are_refused(model, adata, tmp_path):
    path = tmp_path / "a.h5ad"
    for other in (adata[:299], adata[::-1]):
        other.copy().write_h5ad(path)
        before = path.read_bytes()
        with pytest.raises(CellsError, match="cells"):
            latent(model, path)
        assert path.read_bytes() == before


def test_latents_need_somewhere_to_go(model, adata, tmp_path):
    with pytest.raises(OptionError, match=r"nothing\.h5ad"):
        latent(model, tmp_path / "nothing.h5ad")
    memory = atlasvi.Atlas.from_anndata(adata)
    with pytest.raises(OptionError):
        latent(model, atlas=memory)


def test_latents_that_are_cut_off_leave_the_store_as_it_was(model, store, adata, tmp_path):
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)

    def broken():
        yield from [np.zeros((100, 3), np.float32)]
        raise KeyboardInterrupt

    for out, whole in ((None, lambda: snapshot(store)), (path, path.read_bytes)):
        before = whole()
        with pytest.raises(KeyboardInterrupt):
            write_latent(broken(), model.atlas, 3, out, "X_scVI", quiet)
        assert whole() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "atlas.zarr"]


def test_what_is_read_is_not_replaced(model, store, adata, tmp_path):
    before = snapshot(store)
    for data in (None, model.encode(), atlasvi.open([store])):
        with pytest.raises(StoreError, match="is what is read from"):
            model.write_expression(store, data, genes=["gene-1"], overwrite=True)
    atlasvi.ingest(adata, tmp_path / "other.zarr")
    joined = atlasvi.open({"a": store, "b": tmp_path / "other.zarr"}, make_unique=True)
    with pytest.raises(StoreError, match=r"other\.zarr' is what is read from"):
        model.write_expression(tmp_path / "other.zarr", joined, genes=["gene-1"], overwrite=True)
    assert snapshot(store) == before
