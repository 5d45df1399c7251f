"""LinearSCVI: what its loadings mean, and what it refuses."""

import numpy as np
import pytest

from atlasvi.errors import NotTrainedError, OptionError
from atlasvi.models.ldvae import LinearSCVI


def build(adata, setup=None, **options):
    LinearSCVI.setup_anndata(adata, **{"batch_key": "batch", "gene_mask": None, **(setup or {})})
    return LinearSCVI(adata, **{"n_hidden": 16, "n_latent": 3, **options})


@pytest.mark.parametrize("norm", ["both", "none"])
def test_log_rho_moves_by_the_loadings(norm, adata):
    """A step along z_k changes log rho by a gene's loading, and by one constant for all genes."""
    import torch

    model = build(adata, use_batch_norm=norm)
    model.train(2, batch_size=64, enable_progress_bar=False)
    loadings = model.get_loadings().to_numpy()
    minibatch = next(model._minibatches(None, slice(0, 5), None))
    z = torch.zeros(5, 3)
    with torch.no_grad():
        before = model.module.decode_log_rho(z, minibatch).numpy()
        for k in range(3):
            step = z.clone()
            step[:, k] = 1
            change = model.module.decode_log_rho(step, minibatch).numpy() - before - loadings[:, k]
            np.testing.assert_allclose(change, change[:, :1].repeat(60, 1), atol=1e-5)


def test_loadings_have_names_and_covariates_are_left_out(adata):
    model = build(adata, {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]})
    with pytest.raises(NotTrainedError):
        model.get_loadings()
    model.train(1, enable_progress_bar=False)
    loadings = model.get_loadings()
    assert list(loadings.columns) == ["Z_0", "Z_1", "Z_2"]
    assert list(loadings.index) == list(adata.var_names)
    np.testing.assert_allclose(model.expression()[:9].compute().sum(1), 1, rtol=1e-5)


def test_a_dispersion_of_each_cell_needs_hidden_layers(adata):
    with pytest.raises(OptionError, match=r"gene-cell.*hidden layers"):
        build(adata, dispersion="gene-cell")
