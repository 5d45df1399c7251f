"""rho on demand: lazy, in chunks, and the same however it is cut."""

import warnings

import dask
import numpy as np
import pytest
import torch

from atlasvi.errors import GenesError, ModelError, ObsError, OptionError
from atlasvi.infer import decode as decode_module
from atlasvi.infer.decode import chunk_of
from atlasvi.models.scvi import SCVI
from atlasvi.store.atlas import Atlas

N_OBS, N_VARS = 300, 60


@pytest.fixture(params=["observed", "latent library"])
def model(request, adata):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3, use_observed_lib_size=request.param == "observed")
    model.train(2, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    return model


@pytest.fixture
def reads(monkeypatch):
    """The sizes of the blocks that are read from where the counts are."""
    sizes = []
    real = Atlas.read_rows

    def spy(self, rows):
        counts = real(self, rows)
        sizes.append(counts.n_obs)
        return counts

    monkeypatch.setattr(Atlas, "read_rows", spy)
    return sizes


def small_chunks(monkeypatch, n_bytes=1):
    monkeypatch.setattr(decode_module, "CHUNK_BYTES", n_bytes)


def test_nothing_is_read_until_it_is_asked_for(model, reads):
    rho = model.expression(genes=["gene-1"])
    assert rho.shape == (N_OBS, 1)
    assert rho.dtype == np.float32
    # The whole of an array that is known before it is made.
    assert all(isinstance(n, int) for sizes in rho.chunks for n in sizes)
    assert not reads
    rho[:5].compute()
    assert reads


def test_only_the_chunks_asked_for_are_read(model, reads, monkeypatch):
    small_chunks(monkeypatch)
    rho = model.expression()
    assert rho.chunks[0] == (64, 64, 64, 64, 44)
    rho[70:80].compute()
    assert reads == [64]


def test_no_chunk_is_larger_than_the_limit(model, monkeypatch):
    for n_obs, n_vars in ((10**8, 60_000), (10**6, 2_000), (100, 50_000), (5, 3)):
        rows = decode_module.chunk_rows(n_obs, n_vars)
        assert 1 <= rows <= max(64, n_obs)
        assert rows == 64 or rows * n_vars * 4 <= decode_module.CHUNK_BYTES
    seen = []
    real = decode_module.Decoding.__call__
    monkeypatch.setattr(
        decode_module.Decoding, "__call__", lambda self, b, o: seen.append(len(b.cells)) or real(self, b, o)
    )
    small_chunks(monkeypatch)
    model.expression().compute()
    assert sorted(seen) == [44, 64, 64, 64, 64]


def test_rho_of_each_cell_sums_to_one(model):
    rho = model.expression(n_samples=3).compute()
    assert (rho > 0).all()
    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"transform_batch": "b1"}, {"n_samples": 3}, {"library_size": "latent"}])
def test_some_genes_are_those_columns_of_all_genes(how, model):
    everything = model.expression(**how).compute()
    for genes in ([5], [59, 0, 7], [3, 3], list(range(N_VARS))[::-1]):
        names = [f"gene-{g}" for g in genes]
        np.testing.assert_allclose(
            model.expression(genes=names, **how).compute(), everything[:, genes], rtol=2e-5
        )


def test_one_gene_may_be_named_without_a_list(model):
    np.testing.assert_array_equal(
        model.expression(genes="gene-7").compute(), model.expression(genes=["gene-7"]).compute()
    )
    assert model.get_normalized_expression(gene_list="gene-7").columns.tolist() == ["gene-7"]


@pytest.mark.parametrize("cells", [slice(10, 200, 3), [299, 4, 4], np.arange(N_OBS) % 7 == 2])
def test_some_cells_are_those_rows_of_all_cells(cells, model):
    everything = model.expression(n_samples=2).compute()
    np.testing.assert_allclose(
        model.expression(cells=cells, n_samples=2).compute(), everything[cells], rtol=2e-5
    )


@pytest.mark.parametrize("n_bytes", [1, 100 * 4 * N_VARS, 128 * 4 * N_VARS])
def test_nothing_depends_on_the_chunks(n_bytes, model, monkeypatch):
    how = {"n_samples": 2, "transform_batch": ["b1", "b2"], "library_size": "latent"}
    whole = model.expression(**how)
    assert whole.npartitions == 1
    expected = whole.compute()
    small_chunks(monkeypatch, n_bytes)
    cut = model.expression(**how)
    assert cut.npartitions > 1
    for scheduler in ("threads", "synchronous"):
        np.testing.assert_allclose(cut.compute(scheduler=scheduler), expected, rtol=2e-5)


def test_the_same_seed_gives_the_same_and_another_another(model):
    one = model.expression(seed=1).compute()
    np.testing.assert_array_equal(one, model.expression(seed=1).compute())
    assert not np.allclose(one, model.expression(seed=2).compute(), rtol=1e-3)


def test_two_requests_in_one_graph_are_not_mixed_up(model):
    lazy = [model.expression(seed=s, genes=["gene-1"]) for s in (1, 2)]
    together = dask.compute(*lazy)
    for both, alone in zip(together, lazy, strict=True):
        np.testing.assert_array_equal(both, alone.compute())


def test_samples_are_averaged(model):
    """Sample i of a request is what a request that starts there would draw: by the noise's own key."""
    one = model.expression(n_samples=1).compute()
    many = model.expression(n_samples=400).compute()
    more = model.expression(n_samples=400, seed=9).compute()
    # Two means of 400 lie nearer to each other than one draw to either.
    assert np.abs(many - more).mean() < 0.2 * np.abs(one - more).mean()
    np.testing.assert_allclose(many.sum(1), 1, rtol=1e-5)


def test_several_batches_are_the_mean_of_each(model):
    each = [model.expression(transform_batch=name).compute() for name in ("b1", "b2")]
    assert not np.allclose(each[0], each[1], rtol=1e-3)
    np.testing.assert_allclose(
        model.expression(transform_batch=["b1", "b2"]).compute(), np.mean(each, axis=0), rtol=1e-5
    )


def test_a_cells_own_batch_is_the_default(model, adata):
    own = model.expression().compute()
    in_b1 = (adata.obs["batch"] == "b1").to_numpy()
    each = [model.expression(transform_batch=name).compute() for name in ("b1", "b2")]
    np.testing.assert_allclose(own, np.where(in_b1[:, None], *each), rtol=1e-5)


def test_batches_that_are_numbers_may_be_given_as_numbers(adata):
    adata.obs["batch"] = (adata.obs["batch"] == "b2").astype(int)
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = SCVI(adata, n_hidden=8, n_latent=2)
    model.train(1, enable_progress_bar=False)
    np.testing.assert_array_equal(
        model.expression(transform_batch=1).compute(), model.expression(transform_batch="1").compute()
    )


def test_the_library_size_is_a_number_or_the_cells_own(model, adata):
    rho = model.expression().compute()
    np.testing.assert_allclose(model.expression(library_size=1e4).compute(), rho * 1e4, rtol=1e-5)
    own = model.expression(library_size="latent").compute() / rho
    np.testing.assert_allclose(own, own[:, :1].repeat(N_VARS, 1), rtol=1e-4)
    if not model.module.library_is_latent:
        np.testing.assert_allclose(own[:, 0], np.asarray(adata.X.sum(1)).ravel(), rtol=1e-4)


def test_the_data_frame_is_the_lazy_array(model, adata):
    frame = model.get_normalized_expression(n_samples=2, seed=3, library_size=100)
    np.testing.assert_array_equal(
        frame.to_numpy(), model.expression(n_samples=2, seed=3, library_size=100).compute()
    )
    assert frame.index.tolist() == adata.obs_names.tolist()
    assert frame.columns.tolist() == adata.var_names.tolist()
    array = model.get_normalized_expression(gene_list=["gene-9"], indices=[4, 2], return_numpy=True)
    np.testing.assert_allclose(array, model.expression().compute()[[4, 2]][:, [9]], rtol=2e-5)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        ({"genes": ["gene-1", "gen-2"]}, GenesError, "'gen-2'; near it: gene-2"),
        ({"transform_batch": "b3"}, ObsError, "'b3'.*b1, b2"),
        ({"n_samples": 0}, OptionError, "n_samples"),
        ({"library_size": "observed"}, OptionError, "'observed'"),
        ({"library_size": -5}, OptionError, "above 0 or 'latent', is -5"),
        ({"library_size": float("nan")}, OptionError, "is nan"),
        ({"library_size": None}, OptionError, "is None"),
        ({"genes": []}, GenesError, "no gene was asked for"),
        ({"seed": -1}, OptionError, "seed must be"),
        ({"precision": "half"}, OptionError, "'half'.*bfloat16"),
        ({"memory_budget": "much"}, OptionError, "'much'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(ask, error, words, model, reads):
    with pytest.raises(error, match=words):
        model.expression(**ask)
    assert not reads


# --- from stored latents ------------------------------------------------------------------------

HOWS = [
    {},
    {"genes": ["gene-7", "gene-1"], "n_samples": 3},
    {"transform_batch": ["b1", "b2"], "n_samples": 2, "library_size": "latent"},
    {"genes": ["gene-0"], "library_size": "latent"},
    {"n_samples": 3, "return_mean": False, "cells": [7, 0, 299]},
]


@pytest.mark.parametrize("how", HOWS)
def test_stored_latents_give_what_counts_give(how, model, reads):
    cells = model.encode()
    expected = model.expression(**how).compute()
    reads.clear()
    for _ in range(2):  # the second time with normalisers that were kept
        np.testing.assert_allclose(model.expression(cells, **how).compute(), expected, rtol=2e-5)
    assert not reads


def test_some_genes_cost_those_genes_once_normalisers_are_kept(model, monkeypatch):
    cells = model.encode()
    how = {"genes": ["gene-3"], "n_samples": 2, "transform_batch": ["b1", "b2"]}
    model.expression(cells, cells=slice(100), **how).compute()
    assert len(cells.normalisers) == 4
    assert [int(np.isfinite(kept).sum()) for kept in cells.normalisers.values()] == [100] * 4
    computed = []
    real = decode_module.SoftmaxLinear.log_normaliser

    def spy(self, h):
        computed.append(len(h))
        return real(self, h)

    monkeypatch.setattr(decode_module.SoftmaxLinear, "log_normaliser", spy)
    model.expression(cells, **how).compute()
    assert computed == [200] * 4  # the others, for each sample and batch
    computed.clear()
    model.expression(cells, genes=["gene-9", "gene-8"], n_samples=2, transform_batch="b2").compute()
    assert not computed
    model.expression(cells, genes=["gene-9"], seed=1).compute()
    assert computed == [300]


def test_latents_of_other_weights_are_refused(model):
    cells = model.encode()
    with torch.no_grad():
        model.module.decoder.scale.bias[0] += 1
    with pytest.raises(ModelError, match="encode again"):
        model.expression(cells)


def test_cells_may_be_chosen_when_encoding_and_when_decoding(model):
    expected = model.expression(genes=["gene-5"]).compute()
    some = model.encode(cells=[200, 3, 50])
    np.testing.assert_allclose(
        model.expression(some, genes=["gene-5"]).compute(), expected[[200, 3, 50]], rtol=2e-5
    )
    frame = model.get_normalized_expression(some, indices=[2, 0], gene_list=["gene-5"])
    assert frame.index.tolist() == ["cell-50", "cell-200"]
    np.testing.assert_allclose(frame.to_numpy(), expected[[50, 200]], rtol=2e-5)


def test_bfloat16_is_near_and_is_asked_for(model):
    exact = model.expression(n_samples=2).compute()
    rough = model.expression(n_samples=2, precision="bfloat16").compute()
    np.testing.assert_allclose(rough, exact, rtol=0.05)
    assert np.abs(rough / exact - 1).max() > 1e-4


def test_a_smaller_budget_makes_smaller_chunks(model):
    sizes = [model.expression(memory_budget=b).chunks[0][0] for b in ("1MB", 100_000, 1)]
    assert sizes[0] > sizes[1] > sizes[2] == 64


# --- what scvi-tools users have -----------------------------------------------------------------


def test_each_draw_may_be_had(model):
    each = model.get_normalized_expression(n_samples=4, return_mean=False, gene_list=["gene-2", "gene-5"])
    assert isinstance(each, np.ndarray) and each.shape == (4, N_OBS, 2)
    mean = model.get_normalized_expression(n_samples=4, gene_list=["gene-2", "gene-5"])
    np.testing.assert_allclose(each.mean(0), mean, rtol=1e-5)
    assert np.abs(each[0] / each[1] - 1).mean() > 1e-3
    one = model.get_normalized_expression(n_samples=1, return_mean=False, gene_list=["gene-2", "gene-5"])
    np.testing.assert_allclose(one, each[0], rtol=1e-5)
    np.testing.assert_allclose(
        model.expression(n_samples=4, return_mean=False, genes=["gene-2", "gene-5"]).compute(),
        each,
        rtol=1e-5,
    )


def test_rows_overall_are_draws_of_cells_at_random(model):
    frame = model.get_normalized_expression(n_samples_overall=700, seed=5)
    assert frame.shape == (700, N_VARS)
    # Each is a draw of the cell that it is named after: of 3, since 700 = 2 * 300 + 100.
    each = model.get_normalized_expression(n_samples=3, return_mean=False, seed=5)
    at = [int(name.removeprefix("cell-")) for name in frame.index]
    nearest = np.abs(each[:, at] / frame.to_numpy() - 1).max(2).min(0)
    assert nearest.max() < 2e-5
    assert 200 < len(set(at)) < 300  # with replacement
    again = model.get_normalized_expression(n_samples_overall=700, seed=5, return_numpy=True)
    np.testing.assert_array_equal(again, frame)


def test_importance_weights_are_what_they_are_defined_as(model):
    """Against the definition, written out with torch's distributions."""
    from atlasvi.infer.decode import Request
    from atlasvi.infer.importance import importance_weights, marginal_log_likelihood

    cells = [3, 8, 21, 34]
    source, _ = model._source(None, cells)
    module, cpu = model.module, torch.device("cpu")
    found = importance_weights(
        module, source, 2, Request(seed=4), max_cells=10, truncation=False, n_mc_samples=8
    ).reshape(2, 4)
    assert found.sum() == pytest.approx(1)
    block = source.read(0, 4, cpu)
    x = torch.from_numpy(block.cells.counts.to_scipy().toarray()).double()
    qz = torch.distributions.Normal(block.qz.loc, block.qz.scale)
    log_w = torch.zeros(2, 4, dtype=torch.float64)
    with torch.no_grad():
        px = marginal_log_likelihood(module, block, 8, 4 + (1 << 40))
        for s in range(2):
            z = block.draw(4, s)
            for i in range(4):
                terms = []
                for a in range(4):
                    total = x[a].sum().expand(4).float()
                    p = module.count_parameters(z, total, block.cells)
                    theta = p.theta.expand(4, -1)[i].double()
                    nb = torch.distributions.NegativeBinomial(
                        theta, logits=p.mu[i].double().log() - theta.log()
                    )
                    keep = torch.sigmoid(-p.pi_logits[i].double())
                    each = torch.where(
                        x[a] > 0,
                        keep.log() + nb.log_prob(x[a]),
                        (1 - keep + keep * nb.log_prob(x[a]).exp()).log(),
                    )
                    terms.append(each.sum() - px[a])
                log_q = torch.logsumexp(
                    torch.stack([qz.log_prob(z[i]).sum(1)[a].double() for a in range(4)]), 0
                )
                prior = torch.distributions.Normal(0, 1).log_prob(z[i]).sum().double()
                log_w[s, i] = torch.logsumexp(torch.stack(terms), 0) + prior - log_q
    expected = torch.softmax(log_w.reshape(-1), 0).reshape(2, 4)
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-9)


def test_the_marginal_likelihood_is_above_the_elbo_and_rises_with_draws(model):
    from atlasvi.infer.importance import marginal_log_likelihood

    source, _ = model._source(None, slice(20))
    block = source.read(0, 20, torch.device("cpu"))
    one, many = (marginal_log_likelihood(model.module, block, n, 0).numpy() for n in (1, 200))
    elbo = np.mean([model.get_elbo(indices=range(20), seed=s, return_mean=False) for s in range(50)], axis=0)
    assert (many > elbo - 1).all() and many.mean() > elbo.mean()
    assert many.mean() > one.mean() - 1


def test_importance_weights_choose_rows(model):
    how = {
        "n_samples_overall": 20,
        "max_cells": 5,
        "n_mc_samples": 3,
        "indices": range(12),
        "return_numpy": True,
    }
    plain = model.get_normalized_expression(**how)
    weighted = model.get_normalized_expression(**how, weights="importance")
    assert weighted.shape == plain.shape == (20, N_VARS)
    assert not np.array_equal(weighted, plain)
    with pytest.raises(OptionError, match="one batch"):
        model.get_normalized_expression(**how, weights="importance", transform_batch=["b1", "b2"])
    with pytest.raises(OptionError, match="counts"):
        model.get_normalized_expression(model.encode(), **how, weights="importance")


def test_what_would_not_fit_is_refused_with_its_size(model, monkeypatch):
    monkeypatch.setattr("atlasvi.infer.normalized.LARGEST_DENSE", 100_000)
    model.get_normalized_expression()
    for how in ({"n_samples": 2, "return_mean": False}, {"n_samples_overall": 600}):
        with pytest.raises(OptionError, match=r"600 x 60 are 0\.0 GiB.*model\.expression"):
            model.get_normalized_expression(**how)


def test_decoding_leaves_weights_and_random_state_alone(model):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    state = torch.random.get_rng_state()
    model.expression(n_samples=2).compute()
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(
        parameter.grad is not None and parameter.grad.isnan().any() for parameter in model.module.parameters()
    )


def test_decoding_holds_no_more_than_a_few_chunks(adata, tmp_path, monkeypatch):
    """Writing rho takes far less than rho: enough cells that a heap's own ups and downs do not count."""
    n_obs, n_vars = 16_000, 500
    import anndata
    import scipy.sparse as sp

    from atlasvi.infer.write import write_expression
    from atlasvi.memory import Watch

    rng = np.random.default_rng(0)
    big = anndata.AnnData(sp.random(n_obs, n_vars, 0.02, "csr", np.float32, rng, lambda n: np.ones(n)))
    SCVI.setup_anndata(big)
    model = SCVI(big, n_hidden=8, n_latent=2)
    model.train(1, batch_size=512, train_size=0.1, validation_size=0.0, enable_progress_bar=False)
    small_chunks(monkeypatch, 64 * 4 * n_vars)  # 64 cells: 128 kB; all of them are 32 MB

    def write(name):
        rho = model.expression()
        assert rho.npartitions == 250
        names = list(model.fields.var_names)
        write_expression(
            rho, model.atlas.read_names, names, tmp_path / name, overwrite=False, advance=lambda *_: None
        )

    write("warm.zarr")
    with warnings.catch_warnings(), Watch(interval=0.001) as watch:
        write("rho.zarr")
    assert watch.peak_bytes - watch.before_bytes < n_obs * n_vars * 4 / 2


def test_a_chunk_is_computed_without_a_look_at_the_tasks_of_the_others(model, monkeypatch):
    monkeypatch.setattr("atlasvi.infer.decode.CHUNK_BYTES", 1)
    rho = model.expression(genes=["gene-3"])
    assert rho.npartitions > 3
    seen, get = [], dask.get
    monkeypatch.setattr(dask, "get", lambda tasks, key: seen.append(len(tasks)) or get(tasks, key))
    found = [chunk_of(rho, i) for i in range(rho.npartitions)]
    assert seen == [2] * rho.npartitions  # the chunk, and the model
    np.testing.assert_array_equal(np.concatenate(found), rho.compute())
