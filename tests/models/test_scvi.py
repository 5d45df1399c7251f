"""The public class: what it takes, refuses, leaves alone and answers."""

import inspect
import re
import warnings
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import atlasvi
from atlasvi.errors import CellsError, GenesError, NotTrainedError, ObsError, OptionError
from atlasvi.models.data import library_moments
from atlasvi.models.scvi import SCVI
from atlasvi.store.fields import resolve

LIKELIHOODS = ["zinb", "nb", "zip", "poisson"]
DISPERSIONS = ["gene", "gene-batch", "gene-label", "gene-cell"]


def build(adata, *, setup=None, **options):
    SCVI.setup_anndata(adata, **{"batch_key": "batch", "gene_mask": None, **(setup or {})})
    return SCVI(adata, **{"n_hidden": 16, "n_latent": 3, **options})


def train(model, max_epochs=2, **options):
    model.train(max_epochs, **{"batch_size": 64, "enable_progress_bar": False, **options})
    return model


@pytest.fixture
def model(adata):
    return train(build(adata))


# --- training of each kind ----------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_and_dispersion_learns(likelihood, dispersion, adata):
    model = build(adata, setup={"labels_key": "cell_type"}, gene_likelihood=likelihood, dispersion=dispersion)
    train(model, 6, plan_kwargs={"lr": 0.01})
    loss = model.history["reconstruction_loss_validation"]["reconstruction_loss_validation"].to_numpy()
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    assert np.isfinite(model.get_latent_representation()).all()
    assert ("log_theta" in dict(model.module.named_parameters())) == (
        likelihood in ("zinb", "nb") and dispersion != "gene-cell"
    )


COVARIATES = {
    "labels_key": "cell_type",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["percent_mito", "age"],
}
OPTIONS = {
    "three layers": {"n_layers": 3},
    "layer norm": {"use_batch_norm": "none", "use_layer_norm": "both"},
    "no norm": {"use_batch_norm": "none"},
    "norm in the encoder": {"use_batch_norm": "encoder", "use_layer_norm": "decoder"},
    "latent library": {"use_observed_lib_size": False},
    "encoded covariates": {"encode_covariates": True, "n_layers": 2},
    "covariates in the first layer only": {"deeply_inject_covariates": False, "n_layers": 2},
    "no dropout": {"dropout_rate": 0.0},
    "one dimension": {"n_latent": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_and_answers(options, adata):
    model = train(build(adata, setup=COVARIATES, **options), 3, plan_kwargs={"lr": 0.01})
    loss = model.history["elbo_train"]["elbo_train"].to_numpy()
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    assert model.get_latent_representation().shape == (300, options.get("n_latent", 3))
    np.testing.assert_allclose(model.expression()[:50].compute().sum(1), 1, rtol=1e-5)


def test_covariates_change_what_is_decoded(adata):
    model = train(build(adata, setup=COVARIATES), 3, plan_kwargs={"lr": 0.01})
    before = model.expression(cells=slice(20)).compute()
    for column, value in (("donor", "d1"), ("percent_mito", 3.0)):
        other = adata.copy()
        other.obs[column] = (
            pd.Categorical([value] * 300, adata.obs["donor"].cat.categories) if column == "donor" else value
        )
        assert not np.allclose(before, model.expression(other, cells=slice(20)).compute(), rtol=1e-3), column


def test_a_size_factor_takes_the_place_of_the_library_size(adata):
    model = train(build(adata, setup={"size_factor_key": "size_factor"}, use_observed_lib_size=False))
    assert not model.module.library_is_latent
    one = model.expression(cells=slice(20)).compute()
    scaled = model.expression(cells=slice(20), library_size="latent").compute()
    np.testing.assert_allclose(scaled, one * adata.obs["size_factor"].to_numpy()[:20, None], rtol=1e-5)


def test_the_setting_of_the_paper(adata):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = SCVI.paper(adata, n_latent=4)
    config, plan = model.config, model.plan
    assert (config.use_observed_lib_size, config.encode_covariates, config.n_latent) == (False, True, 4)
    assert (plan.optimizer, plan.lr, plan.eps, plan.n_epochs_kl_warmup) == ("Adam", 1e-3, 0.01, 400)
    train(model, 1)
    assert "batch_index" not in model.history
    assert np.isfinite(model.get_elbo())


def test_library_moments_are_those_of_the_logs_by_batch(adata):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    dense = adata.X.toarray()
    dense[5] = 0  # a cell without counts has no log
    adata.X = sp.csr_matrix(dense)
    model = build(adata, use_observed_lib_size=False)
    found = library_moments(model.atlas, resolve(model.fields, model.atlas), 2)
    total = np.asarray(adata.X.sum(1)).ravel()
    for code, batch in enumerate(("b1", "b2")):
        logs = np.log(total[(adata.obs["batch"] == batch).to_numpy() & (total > 0)])
        assert found.log_mean[code] == pytest.approx(logs.mean(), rel=1e-6)
        assert found.log_var[code] == pytest.approx(logs.var(), rel=1e-5)
    np.testing.assert_allclose(model.module.library_log_mean, found.log_mean, rtol=1e-6)


def test_what_was_learnt_is_not_set_to_the_shares_of_genes_again(adata):
    model = train(build(adata), 3)
    before = model.module.decoder.scale.bias.detach().clone()
    train(model, 1, plan_kwargs={"lr": 1e-9, "averaging": None})
    torch.testing.assert_close(model.module.decoder.scale.bias, before, rtol=0, atol=1e-5)


# --- what it leaves alone -----------------------------------------------------------------------


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_anndata(one, other):
    pd.testing.assert_frame_equal(one.obs, other.obs)
    pd.testing.assert_frame_equal(one.var, other.var)
    assert (one.X != other.X).nnz == 0
    assert one.X.dtype == other.X.dtype
    for part in ("layers", "obsm", "varm", "obsp", "varp"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        for key in mine:
            left, right = (m.toarray() if sp.issparse(m) else np.asarray(m) for m in (mine[key], theirs[key]))
            np.testing.assert_array_equal(left, right)


def test_an_anndata_gets_one_entry_in_uns_and_nothing_else(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.copy()
    adata.X.data = np.log1p(adata.X.data)
    adata.obsm["X_pca"] = np.ones((300, 2))
    adata.uns["mine"] = {"a": 1}
    before = adata.copy()
    model = train(build(adata, setup={"layer": "counts", **COVARIATES}), 1)
    model.get_latent_representation()
    model.get_normalized_expression(indices=[1, 2])
    model.get_elbo()
    assert_same_anndata(before, adata)
    assert adata.uns.keys() == {"mine", "atlasvi"}
    assert isinstance(adata.uns["atlasvi"], str)
    assert adata.uns["mine"] == {"a": 1}


def test_the_entry_survives_a_file(adata, tmp_path):
    build(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert SCVI(again, n_hidden=8).fields == SCVI(adata, n_hidden=8).fields


def test_a_store_on_disk_is_not_written_to(small_atlas):
    before = snapshot(small_atlas.path)
    model = train(build(small_atlas), 1)
    model.get_latent_representation()
    model.expression(genes=["gene-1"]).compute()
    assert snapshot(small_atlas.path) == before


def test_data_that_were_not_set_up_are_refused_with_the_call(adata, small_store):
    for data in (adata, small_store, atlasvi.open(small_store)):
        with pytest.raises(OptionError, match="setup_anndata"):
            SCVI(data)
    with pytest.raises(OptionError, match=r"atlasvi\.open"):
        SCVI.setup_anndata(str(small_store))


# --- genes --------------------------------------------------------------------------------------


def test_highly_variable_genes_are_taken_where_they_are_marked_and_it_says_so(adata, caplog):
    model = build(adata, setup={"gene_mask": "auto"})
    assert "highly_variable" in caplog.text
    assert model.fields.var_names == tuple(adata.var_names[adata.var["highly_variable"]])
    assert model.module.decoder.scale.out_features == 20


def test_without_a_mark_all_genes_are_taken(adata, caplog):
    del adata.var["highly_variable"]
    assert build(adata, setup={"gene_mask": "auto"}).fields.n_vars == 60
    assert not caplog.text


def test_a_named_mask_is_honoured_and_saved_with_the_model(adata, tmp_path):
    adata.var["mine"] = np.arange(60) < 7
    model = train(build(adata, setup={"gene_mask": "mine"}), 1)
    model.save(tmp_path / "m")
    # New data need no mask: the model knows its genes.
    del adata.var["mine"], adata.uns["atlasvi"]
    loaded = SCVI.load(tmp_path / "m")
    assert loaded.fields.gene_mask == "mine"
    assert loaded.fields.var_names == tuple(adata.var_names[:7])
    np.testing.assert_array_equal(
        loaded.get_latent_representation(adata), model.get_latent_representation(adata)
    )


def test_a_masked_model_is_the_model_of_those_genes_alone(adata):
    whole = train(build(adata, setup={"gene_mask": "highly_variable"}), 1)
    alone = adata[:, adata.var["highly_variable"]].copy()
    part = train(build(alone), 1)
    for name, value in part.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[name]), name


def test_fewer_cells_than_genes_warn(adata):
    with pytest.warns(UserWarning, match="40 cells for 60 genes"):
        build(adata[:40].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(adata[:60].copy())


# --- where counts are ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["counts", "raw"])
def test_counts_in_a_layer_or_raw_are_the_same_as_in_x(where, adata):
    expected = train(build(adata), 1).get_latent_representation()
    other = adata.copy()
    if where == "raw":
        other.raw = other
    else:
        other.layers[where] = other.X.copy()
    other.X = sp.csr_matrix(np.full(adata.shape, 0.5, np.float32))
    del other.uns["atlasvi"]
    model = train(build(other, setup={"layer": where}), 1)
    np.testing.assert_array_equal(model.get_latent_representation(), expected)
    np.testing.assert_array_equal(model.get_latent_representation(other.copy()), expected)


@pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")  # anndata on its own next release
def test_a_path_is_read_at_the_layer_the_model_was_trained_on(adata, tmp_path):
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.full(adata.shape, 0.5, np.float32))
    model = train(build(adata, setup={"layer": "counts"}), 1)
    adata.write_zarr(tmp_path / "a.zarr")
    np.testing.assert_array_equal(
        model.get_latent_representation(tmp_path / "a.zarr"), model.get_latent_representation()
    )


# --- cells without counts, genes without counts -------------------------------------------------


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empty_cells_and_genes_are_finite(likelihood, observed, adata):
    dense = adata.X.toarray()
    dense[[0, 7, 299]] = 0
    dense[:, 4] = 0
    adata.X = sp.csr_matrix(dense)
    model = train(build(adata, gene_likelihood=likelihood, use_observed_lib_size=observed), 2)
    assert np.isfinite(model.history["elbo_train"].to_numpy()).all()
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_elbo(return_mean=False)).all()
    assert np.isfinite(model.expression(library_size="latent").compute()).all()


# --- new data -----------------------------------------------------------------------------------


def test_new_data_need_no_set_up_and_their_genes_may_come_in_any_order(model, adata, tmp_path):
    # A sum over genes in another order differs in its last bits.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    expected = model.get_latent_representation()
    rng = np.random.default_rng(0)
    more = anndata.AnnData(
        sp.csr_matrix(np.ones((300, 5), np.float32)), var=pd.DataFrame(index=list("abcde"))
    )
    more.obs_names = adata.obs_names
    both = anndata.concat([adata, more], axis=1, merge="first")
    other = both[:, rng.permutation(both.n_vars)].copy()
    assert "atlasvi" not in other.uns
    close(model.get_latent_representation(other), expected)
    assert "atlasvi" not in other.uns
    atlasvi.ingest(other, tmp_path / "other.zarr")
    close(model.get_latent_representation(tmp_path / "other.zarr"), expected)
    with atlasvi.open(tmp_path / "other.zarr") as atlas:
        close(model.get_latent_representation(atlas), expected)
        close(model.get_latent_representation(atlas[100:110]), expected[100:110])
    # rho differs by what its latent does: a few of float32's last bits.
    np.testing.assert_allclose(
        model.expression(other, genes=["gene-3", "gene-1"]).compute(),
        model.expression(genes=["gene-3", "gene-1"]).compute(),
        rtol=1e-5,
    )


def test_missing_genes_are_named(model, adata):
    with pytest.raises(GenesError, match=r"2 of the model's 60 genes: 'gene-0', 'gene-1'"):
        model.get_latent_representation(adata[:, 2:].copy())


def test_a_batch_that_training_never_saw_is_named_with_those_it_did(model, adata):
    other = adata.copy()
    other.obs["batch"] = ["b1"] * 299 + ["b9"]
    for ask in (model.get_latent_representation, model.get_elbo, model.expression):
        with pytest.raises(ObsError, match=r"'b9'.*'b1'.*'b2'"):
            ask(other)


def test_a_missing_batch_column_is_named_with_its_neighbour(model, adata):
    other = adata.copy()
    other.obs = other.obs.rename(columns={"batch": "Batch"})
    with pytest.raises(ObsError, match=r"'batch'.*'Batch'"):
        model.get_latent_representation(other)


def test_categories_in_another_order_are_the_same_batches(model, adata):
    other = adata.copy()
    other.obs["batch"] = other.obs["batch"].cat.reorder_categories(["b2", "b1"])
    np.testing.assert_allclose(model.expression(other).compute(), model.expression().compute(), rtol=1e-6)


# --- questions ----------------------------------------------------------------------------------


def test_nothing_is_answered_before_training(adata):
    model = build(adata)
    for ask in (
        model.get_latent_representation,
        model.get_elbo,
        model.expression,
        model.get_reconstruction_error,
    ):
        with pytest.raises(NotTrainedError, match="train"):
            ask()
    with pytest.raises(NotTrainedError):
        _ = model.train_indices


CHOICES = {
    "in any order": ([5, 3, 299, 0], [5, 3, 299, 0]),
    "again": ([7, 7, 2], [7, 7, 2]),
    "from the end": ([-1, -300], [299, 0]),
    "mask": (np.arange(300) % 100 == 3, [3, 103, 203]),
}


@pytest.mark.parametrize(("given", "meant"), CHOICES.values(), ids=CHOICES)
def test_cells_are_chosen_the_same_way_everywhere(given, meant, model):
    latent, elbo = model.get_latent_representation(), model.get_elbo(return_mean=False)
    rho = model.expression().compute()
    np.testing.assert_allclose(
        model.get_latent_representation(indices=given), latent[meant], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(model.get_elbo(indices=given, return_mean=False), elbo[meant], rtol=1e-5)
    np.testing.assert_allclose(model.expression(cells=given).compute(), rho[meant], rtol=1e-5)
    frame = model.get_normalized_expression(indices=given)
    assert frame.index.tolist() == [f"cell-{i}" for i in meant]
    np.testing.assert_allclose(frame.to_numpy(), rho[meant], rtol=1e-5)
    one, same = (model.get_latent_representation(give_mean=False, **how) for how in ({}, {"indices": given}))
    np.testing.assert_allclose(one[meant], same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [[300], [-301], np.ones(299, bool), [0.5], [[1, 2]], [], np.zeros(300, bool)]
)
def test_cells_that_are_not_there_are_refused(wrong, model):
    for ask in (
        lambda: model.get_latent_representation(indices=wrong),
        lambda: model.get_elbo(indices=wrong),
        lambda: model.expression(cells=wrong),
    ):
        with pytest.raises(CellsError):
            ask()


def test_the_latent_is_a_mean_a_draw_or_a_distribution(model):
    loc, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_array_equal(model.get_latent_representation(), loc)
    draws = np.stack([model.get_latent_representation(give_mean=False, seed=s) for s in range(200)])
    np.testing.assert_array_equal(draws[3], model.get_latent_representation(give_mean=False, seed=3))
    error = np.sqrt(variance / 200)
    assert np.abs((draws.mean(0) - loc) / error).max() < 5
    assert np.abs(draws.var(0) / variance - 1).mean() < 0.15


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_answers_do_not_depend_on_the_size_of_minibatches(batch_size, model):
    how = {"batch_size": batch_size}
    np.testing.assert_allclose(
        model.get_latent_representation(**how), model.get_latent_representation(), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        model.get_elbo(**how, return_mean=False), model.get_elbo(return_mean=False), rtol=1e-5
    )
    error = model.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
    np.testing.assert_allclose(
        model.get_reconstruction_error(**how, return_mean=False)["reconstruction_loss"], error, rtol=1e-5
    )
    assert model.get_reconstruction_error(**how)["reconstruction_loss"] == pytest.approx(error.mean())


def test_the_elbo_is_minus_the_reconstruction_error_minus_the_divergence(model):
    loc, variance = model.get_latent_representation(return_dist=True)
    divergence = 0.5 * (variance.astype(float) + loc.astype(float) ** 2 - 1 - np.log(variance)).sum(1)
    error = model.get_reconstruction_error(return_mean=False, seed=4)["reconstruction_loss"]
    np.testing.assert_allclose(model.get_elbo(return_mean=False, seed=4), -error - divergence, rtol=1e-5)


def test_the_reconstruction_error_is_that_of_scipys_negative_binomial(adata):
    """With no spread in q(z|x), log p(x|z) is a closed form of rho, theta and the library size."""
    from scipy.stats import nbinom

    model = train(build(adata, gene_likelihood="nb"))
    with torch.no_grad():
        model.module.encoder.log_variance.weight.zero_()
        model.module.encoder.log_variance.bias.fill_(-100)
    rho = model.expression(seed=0).compute().astype(float)
    counts = adata.X.toarray()
    theta = np.exp(model.module.log_theta.detach().numpy()[0].astype(float))
    mu = rho * counts.sum(1, keepdims=True)
    expected = -nbinom.logpmf(counts, theta, theta / (theta + mu)).sum(1)
    found = model.get_reconstruction_error(return_mean=False, seed=0)["reconstruction_loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- what scvi-tools has and we have not --------------------------------------------------------

REFUSED = {
    "sparse": (lambda m: m.train(1, load_sparse_tensor=True), "load_sparse_tensor", "always sparse"),
    "callbacks": (lambda m: m.train(1, callbacks=[]), "callbacks", "on_epoch"),
    "splitter": (lambda m: m.train(1, datasplitter_kwargs={}), "datasplitter_kwargs", "train_size"),
    "anything": (lambda m: m.train(1, nonsense=1), "nonsense", "docstring"),
    "devices": (lambda m: m.train(1, devices=2), "devices=2", "torchrun"),
    "seed": (lambda m: m.train(1, seed=-1), "seed", "0 or more"),
    "accelerator": (lambda m: m.train(1, accelerator="tpu"), "tpu", "cpu"),
    "plan": (
        lambda m: m.train(1, plan_kwargs={"n_epochs_kl_warmups": 1}),
        "n_epochs_kl_warmups",
        "did you mean",
    ),
    "monitor": (lambda m: m.train(1, early_stopping_monitor="loss"), "loss", "elbo_validation"),
    "weights": (lambda m: m.get_normalized_expression(weights="x"), "weights", "importance"),
    "importance": (
        lambda m: m.get_normalized_expression(weights="importance"),
        "importance",
        "n_samples_overall=",
    ),
    "mc": (lambda m: m.get_latent_representation(mc_samples=5), "mc_samples", "give_mean=False"),
    "loader": (lambda m: m.get_elbo(dataloader=1), "dataloader", "Atlas"),
    "prefix": (lambda m: m.save("x", prefix="p"), "prefix", "folder of its own"),
}


@pytest.mark.parametrize(("ask", "named", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name_with_our_way(
    ask, named, remedy, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as raised:
        ask(model)
    assert named in str(raised.value)
    assert remedy in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_not_replaced_in_silence(adata):
    with pytest.raises(OptionError, match="no CUDA device"):
        build(adata).train(1, accelerator="gpu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"latent_distribution": "ln"}, "'ln'"),
        ({"gene_likelihood": "normal"}, "'normal'"),
        ({"dispersion": "cell"}, "'cell'"),
        ({"use_batch_norm": "yes"}, "use_batch_norm"),
        ({"n_layers": 0}, "n_layers"),
        ({"n_latent": 0}, "n_latent"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options, named, adata):
    with pytest.raises(OptionError, match=named):
        build(adata, **options)


def test_a_text_where_columns_are_meant_is_refused(adata):
    with pytest.raises(OptionError, match=r"\['donor'\]"):
        SCVI.setup_anndata(adata, categorical_covariate_keys="donor")


def test_a_result_that_does_not_fit_is_refused_with_its_size(model, monkeypatch):
    monkeypatch.setattr("atlasvi.infer.normalized.LARGEST_DENSE", 1000)
    with pytest.raises(OptionError, match=r"300 x 60 are .*model\.expression"):
        model.get_normalized_expression()


def test_repr_says_what_it_is(model, adata):
    assert repr(model) == "SCVI(60 genes, 2 batches, trained 2 epochs)"
    assert "not trained" in repr(build(adata))


# --- arguments that every question has ----------------------------------------------------------

QUESTIONS = {
    name: inspect.signature(getattr(SCVI, name)).parameters
    for name in dir(SCVI)
    if name[0] != "_" and inspect.isfunction(getattr(SCVI, name))
}
NEEDED = {
    "differential_expression": {"groupby": "cell_type"},
    "calibration": {"groupby": "cell_type", "group": "T", "n_cells": 20, "n_splits": 1},
    "sample_prior": {"n_cells": 5},
    "sample_neighbourhood": {"cell": 0, "n_cells": 5},
}
WRONG = {
    "seed": (-1, 1.5, 1 << 62), "n_samples": (0, 2.5), "n_mc_samples": (0, 2.5), "batch_size": (0, 2.5),
    "max_epochs": (0, 1.5),
}  # fmt: skip
IGNORED = re.compile(r"batch_size: ignored")


def test_what_is_no_number_of_draws_or_no_seed_is_refused_everywhere(model, tmp_path):
    seen = set()
    for name, parameters in QUESTIONS.items():
        needed = {"out": tmp_path / "x.zarr"} if name == "write_expression" else NEEDED.get(name, {})
        for argument, values in WRONG.items():
            if argument not in parameters:
                continue
            method = getattr(model, name)
            if argument == "batch_size" and IGNORED.search(method.__doc__):
                continue
            if argument == "n_mc_samples" and name != "get_marginal_ll":
                continue  # refused or ignored by name, as the docstring says
            for value in values:
                with pytest.raises(OptionError, match=argument):
                    found = method(**needed, **{argument: value})
                    list(found) if inspect.isgenerator(found) else found
                seen.add((name, argument))
    assert len(seen) > 30
    assert not (tmp_path / "x.zarr").exists()


def test_a_view_without_cells_is_refused_everywhere(model, adata):
    nobody = atlasvi.Atlas.from_anndata(adata)[[]]
    asked = 0
    for name, parameters in QUESTIONS.items():
        if list(parameters)[1:2] != ["adata"] or name == "setup_anndata" or name.startswith("was_"):
            continue
        with pytest.raises(CellsError, match="no cells"):
            found = getattr(model, name)(nobody, **NEEDED.get(name, {}))
            list(found) if inspect.isgenerator(found) else found
        asked += 1
    assert asked >= 15
    with pytest.raises(CellsError, match="no cells"):
        atlasvi.publish(model, nobody, "nowhere.atlasvi")
