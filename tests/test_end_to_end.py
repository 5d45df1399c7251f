"""From real files to rho: ingest, train, latent, decode."""

import anndata
import numpy as np
import pytest
import torch

import atlasvi
from atlasvi.infer.write import write_expression, write_latent
from atlasvi.models.scvi import SCVI


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*underfitting:UserWarning")  # each has fewer cells than genes
@pytest.mark.parametrize(
    ("name", "batch_key"),
    [("pbmc_sorted_reference", None), ("worm_neuron", None), ("scmixology_celllines", "batch")],
)
def test_real_counts_go_all_the_way(name, batch_key, data_dir, tmp_path):
    store = tmp_path / "atlas.zarr"
    given = anndata.read_h5ad(data_dir / f"{name}.h5ad")
    report = atlasvi.ingest(data_dir / f"{name}.h5ad", store, shuffle=True)
    assert (report.n_obs, report.n_vars, report.nnz) == (*given.shape, given.X.nnz)

    with atlasvi.open(store) as atlas:
        SCVI.setup_anndata(atlas, batch_key=batch_key, gene_mask=None)
        model = SCVI(atlas, n_hidden=16, n_latent=4)
        model.train(2, batch_size=256, plan_kwargs={"lr": 4e-3}, enable_progress_bar=False)
        loss = model.history["elbo_validation"]["elbo_validation"].to_numpy()
        assert np.isfinite(loss).all()
        assert loss[1] < loss[0]
        model.save(tmp_path / "model")
        write_latent(model.latent_blocks(), atlas, 4, None, "X_scVI", lambda *_: None)
        genes = [str(gene) for gene in given.var_names[[0, 7, 400]]]
        rho = model.expression(genes=genes)
        write_expression(
            rho, atlas.read_names, genes, tmp_path / "rho.zarr", overwrite=False, advance=lambda *_: None
        )

    back = anndata.read_zarr(store)
    assert back.obsm["X_scVI"].shape == (given.n_obs, 4)
    assert np.isfinite(back.obsm["X_scVI"]).all()
    decoded = anndata.read_zarr(tmp_path / "rho.zarr")
    assert decoded.obs_names.tolist() == back.obs_names.tolist()
    assert decoded.var_names.tolist() == genes
    assert ((decoded.X > 0) & (decoded.X < 1)).all()

    # The model finds the cells of the h5ad too, which are in another order.
    where = given.obs_names.get_indexer(back.obs_names[:50])
    again = SCVI.load(tmp_path / "model").get_latent_representation(given, indices=where)
    np.testing.assert_allclose(again, back.obsm["X_scVI"][:50], rtol=1e-3, atol=1e-4)
