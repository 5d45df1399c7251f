"""Query mapping: what is new is trained, what was there is not, and known cells stay where they are."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from atlasvi.errors import GenesError, ModelError, NotTrainedError, ObsError, OptionError
from atlasvi.models.ldvae import LinearSCVI
from atlasvi.models.scanvi import SCANVI
from atlasvi.models.scvi import SCVI
from atlasvi.store.atlas import Atlas

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def train(model, max_epochs=4, **options):
    options = {"batch_size": 64, "plan_kwargs": {"lr": 0.01}, "enable_progress_bar": False, **options}
    model.train(max_epochs, **options)
    return model


def make_reference(adata, kind=SCVI, **options):
    setup = {"batch_key": "batch", "gene_mask": None, "categorical_covariate_keys": ["donor"],
             "continuous_covariate_keys": ["age"]}  # fmt: skip
    if kind is SCANVI:
        setup |= {"labels_key": "cell_type", "unlabeled_category": "Unknown"}
    kind.setup_anndata(adata, **setup)
    options = {"n_hidden": 16, "n_latent": 3, "encode_covariates": True, "n_layers": 2, **options}
    return train(kind(adata, **options))


@pytest.fixture
def query(adata):
    """Cells of a third batch, whose counts are twice as deep, with some of a known one."""
    other = adata.copy()
    other.X = other.X.multiply(2).tocsr()
    other.obs["batch"] = ["new"] * 250 + ["b1"] * 50
    return other


OPTIONS = {
    "defaults": {},
    "latent library": {"use_observed_lib_size": False},
    "a theta each batch": {"dispersion": "gene-batch", "gene_likelihood": "nb"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_only_rows_of_new_batches_are_trained(options, adata, tmp_path):
    reference = make_reference(adata, **options)
    reference.save(tmp_path / "reference")
    other = adata.copy()
    del other.uns["atlasvi"]
    other.X = other.X.multiply(3).tocsr()
    other.obs["batch"] = "new"
    model = SCVI.load_query_data(other, tmp_path / "reference", freeze_batchnorm_decoder=True)
    assert model.fields.batch_categories == ("b1", "b2", "new")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    elbo = model.get_elbo(indices=range(100))
    known = model.get_latent_representation(adata), model.expression(adata).compute()
    np.testing.assert_allclose(known[0], reference.get_latent_representation(), **CLOSE)
    np.testing.assert_allclose(known[1], reference.expression().compute(), **CLOSE)

    train(model, 10)
    changed = {
        name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])
    }
    changed = {name for name in changed if not name.endswith("num_batches_tracked")}
    assert changed
    library = ("library_encoder.",) if "use_observed_lib_size" in options else ()
    for name in changed:
        assert name.endswith("covariate_weight") or name == "log_theta" or name.startswith(library), name
        first = 0 if name == "log_theta" else model.module.get_submodule(name.rpartition(".")[0]).n_continuous
        rows = (model.module.state_dict()[name] != before[name]).any(1)
        assert rows[first + 2], name
        assert rows.sum() == 1, name
    assert ("log_theta" in changed) == ("dispersion" in options)
    assert model.get_elbo(indices=range(100)) > elbo
    np.testing.assert_allclose(model.get_latent_representation(adata), known[0], **CLOSE)
    np.testing.assert_allclose(model.expression(adata).compute(), known[1], **CLOSE)


def test_what_is_not_frozen_is_trained(adata, query):
    reference = make_reference(adata)
    before = reference.module.state_dict()
    defaults = train(SCVI.load_query_data(query, reference))
    same = [
        k
        for k, v in defaults.module.state_dict().items()
        if v.shape == before[k].shape and torch.equal(v, before[k])
    ]
    assert "encoder.mlp.linears.0.weight" in same
    assert "encoder.mlp.batch_norms.0.running_mean" in same
    assert "decoder.mlp.batch_norms.0.running_mean" not in same
    whole = train(SCVI.load_query_data(query, reference, unfrozen=True))
    for name in (
        "encoder.mlp.linears.0.weight",
        "decoder.scale.weight",
        "encoder.mlp.batch_norms.0.running_mean",
    ):
        assert not torch.equal(whole.module.state_dict()[name], before[name])


@pytest.mark.parametrize("kind", [SCVI, SCANVI])
def test_what_is_frozen_stays_so_in_a_model_that_was_saved(kind, adata, query, tmp_path):
    model = kind.load_query_data(query, make_reference(adata, kind))
    model.save(tmp_path / "query")
    again = kind.load(tmp_path / "query", query)
    before = {name: value.clone() for name, value in again.module.state_dict().items()}
    one, other = train(model).module.state_dict(), train(again).module.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(other["decoder.scale.weight"], before["decoder.scale.weight"])
    assert not torch.equal(
        other["encoder.mlp.linears.0.covariate_weight"], before["encoder.mlp.linears.0.covariate_weight"]
    )


def test_a_run_with_other_weights_frozen_refuses_to_go_on(adata, query, tmp_path):
    reference = make_reference(adata)
    train(SCVI.load_query_data(query, reference), 1, checkpoint=tmp_path / "run")
    with pytest.raises(ModelError, match=r"freeze\.batchnorm_decoder=False, now True"):
        other = SCVI.load_query_data(query, reference, freeze_batchnorm_decoder=True)
        train(other, 2, checkpoint=tmp_path / "run", resume=True)


def test_a_reference_of_one_batch(adata, query):
    """It had no row for a batch at all; the reference's cells stay where they are."""
    one = adata.copy()
    one.obs["batch"] = "b1"
    reference = make_reference(one)
    model = SCVI.load_query_data(query, reference)
    np.testing.assert_allclose(
        model.get_latent_representation(one), reference.get_latent_representation(), **CLOSE
    )
    np.testing.assert_allclose(model.expression(one).compute(), reference.expression().compute(), **CLOSE)
    train(model)
    np.testing.assert_allclose(
        model.get_latent_representation(one), reference.get_latent_representation(), **CLOSE
    )


def test_labels_are_transferred_to_a_query_that_has_none(adata, query):
    rng = np.random.default_rng(0)
    group = adata.obs["cell_type"].cat.codes.to_numpy()
    mu = rng.gamma(0.5, 4.0, (3, 60))[group] + 0.1
    adata.X = sp.csr_matrix(rng.poisson(mu).astype(np.float32))
    query.X = sp.csr_matrix(rng.poisson(2 * mu).astype(np.float32))
    truth = query.obs.pop("cell_type")
    reference = make_reference(adata, SCANVI)
    train(reference, 15)
    model = train(SCANVI.load_query_data(query, reference))
    assert (model.predict() == truth).mean() > 0.95
    before = reference.module.classifier.state_dict()
    assert all(
        torch.equal(v, before[k])
        for k, v in model.module.classifier.state_dict().items()
        if "batch_norms" not in k
    )


def test_labels_that_a_model_does_not_use_need_not_be_in_the_query(adata, query):
    changes = {
        "no column": lambda obs: obs.drop(columns="cell_type"),
        "a new level": lambda obs: obs.assign(cell_type="Treg"),
        "gaps": lambda obs: obs.assign(cell_type=np.nan),
    }
    models = {}
    for dispersion in ("gene", "gene-label"):
        SCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type", gene_mask=None)
        models[dispersion] = train(SCVI(adata, n_hidden=16, n_latent=3, dispersion=dispersion), 1)
    query.obs["batch"] = "b1"
    expected = models["gene"].get_elbo(query)
    for change in changes.values():
        other = query.copy()
        other.obs = change(other.obs)
        assert models["gene"].get_elbo(other) == expected
        train(SCVI.load_query_data(other, models["gene"]), 1)
        with pytest.raises(ObsError, match="'cell_type'"):
            models["gene-label"].get_elbo(other)


def test_genes_are_put_into_place_and_missing_ones_are_zero(adata, query):
    reference = make_reference(adata)
    names = list(query.var_names)
    fewer = query[:, [g for g in range(59, -1, -1) if g not in (3, 7)]].copy()
    with pytest.raises(GenesError, match="lacks 2"):
        SCVI.load_query_data(fewer, reference)
    prepared = SCVI.prepare_query_anndata(fewer, reference)
    assert list(prepared.var_names) == names
    expected = query.X.toarray()
    expected[:, [3, 7]] = 0
    np.testing.assert_array_equal(prepared.X.toarray(), expected)
    assert fewer.n_vars == 58
    train(SCVI.load_query_data(prepared, reference), 1)
    with pytest.warns(UserWarning, match="17%"):
        SCVI.prepare_query_anndata(query[:, :10].copy(), reference)
    other = anndata.AnnData(query.X)
    with pytest.raises(GenesError, match="none of the reference's 60 genes"):
        SCVI.prepare_query_anndata(other, reference)


def test_what_a_prepared_query_has_of_its_cells_is_kept(adata, query):
    reference = make_reference(adata)
    query.obsm["X_umap"] = np.arange(600.0).reshape(300, 2)
    query.obsm["table"] = query.obs[["age"]]
    query.obsp["near"] = sp.eye(300, format="csr")
    query.uns["note"], query.layers["dense"] = "mine", query.X.toarray()
    query.var["symbol"] = "x"
    prepared = SCVI.prepare_query_anndata(query[:, 1:], reference)
    assert prepared.obs.equals(query.obs)
    np.testing.assert_array_equal(prepared.obsm["X_umap"], query.obsm["X_umap"])
    assert prepared.obsm["table"].equals(query.obsm["table"])
    assert (prepared.obsp["near"] != query.obsp["near"]).nnz == 0
    assert prepared.uns["note"] == "mine"
    assert prepared.var["symbol"].isna().tolist() == [True] + [False] * 59
    np.testing.assert_array_equal(prepared.layers["dense"].toarray()[:, 1:], query.layers["dense"][:, 1:])
    prepared.obsm["X_umap"][:] = 0
    assert query.obsm["X_umap"].any()


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_repeat_are_named_where_the_reference_has_them(adata, query):
    reference = make_reference(adata)
    twice = anndata.concat([query, query[:, [5]]], axis=1, merge="first")
    for take in (SCVI.prepare_query_anndata, SCVI.load_query_data):
        with pytest.raises(GenesError, match="has 'gene-5' more than once"):
            take(twice, reference)
    others = query[:, [0, 0, 0, 1, 1]].copy()
    others.var_names = ["u", "u", "u", "v", "v"]
    more = anndata.concat([others, query], axis=1, merge="first")
    prepared = SCVI.prepare_query_anndata(more, reference)
    assert (prepared.X != query.X).nnz == 0
    mapped = SCVI.load_query_data(more, reference)
    np.testing.assert_array_equal(
        mapped.get_latent_representation(), mapped.get_latent_representation(prepared)
    )


def test_a_query_that_is_not_in_memory_is_refused(adata, query, tmp_path):
    reference = make_reference(adata)
    query.write_h5ad(tmp_path / "query.h5ad")
    backed = anndata.read_h5ad(tmp_path / "query.h5ad", backed="r")
    for what in (backed, Atlas.from_anndata(query), tmp_path / "query.h5ad"):
        with pytest.raises(OptionError, match=r"that is not; pass query\.to_memory"):
            SCVI.prepare_query_anndata(what, reference)
    prepared = SCVI.prepare_query_anndata(backed.to_memory(), reference)
    assert (prepared.X != query.X).nnz == 0
    backed.file.close()


def test_a_query_that_leaves_nothing_to_train_is_refused(adata):
    model = SCVI.load_query_data(adata.copy(), make_reference(adata), freeze_batchnorm_decoder=True)
    with pytest.raises(OptionError, match="there is nothing to train"):
        train(model)
    assert model.get_elbo() < 0


def test_what_cannot_be_is_refused(adata, query):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    with pytest.raises(NotTrainedError):
        SCVI.load_query_data(query, SCVI(adata))
    LinearSCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    with pytest.raises(ModelError, match="LinearSCVI, not a SCVI"):
        SCVI.load_query_data(query, LinearSCVI(adata))
