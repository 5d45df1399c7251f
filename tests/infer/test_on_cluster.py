"""Two worker processes encode, normalise and add up as this process does; the model travels to each once."""

import pickle

import anndata
import numpy as np
import pytest
import zarr

import atlasvi
from atlasvi.errors import OptionError
from atlasvi.infer import on_cluster
from atlasvi.models.compact import open_compact, publish
from tests.conftest import make_adata

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("on-cluster") / "a.zarr"
    atlasvi.ingest(make_adata(700, 40), path)
    atlas = atlasvi.open(path)
    atlasvi.SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None, continuous_covariate_keys=["age"])
    model = atlasvi.SCVI(atlas, n_latent=3, n_hidden=16, use_observed_lib_size=False)
    model.train(3, batch_size=64, enable_progress_bar=False)
    yield model
    atlas.close()


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Several tasks, of several reads each."""
    monkeypatch.setattr(on_cluster, "TASK_ROWS", 150)
    monkeypatch.setattr(on_cluster, "READ_ROWS", 60)
    monkeypatch.setattr("atlasvi.de.cells.READ_ROWS", 60)


def test_cells_are_encoded_as_they_are_here(client, model):
    for cells in (None, np.random.default_rng(0).permutation(700)[:333]):
        here, there = model.encode(cells=cells), model.encode(cells=cells, client=client)
        for key in ("loc", "scale", "library", "library_scale"):
            np.testing.assert_allclose(getattr(here, key), getattr(there, key), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(here.rows, there.rows)
        assert list(here.read_names(0, 9)) == list(there.read_names(0, 9))
        there.check(model.module)


def test_the_model_is_sent_to_each_worker_once(client, model, monkeypatch):
    sent, had = [], []
    scatter = distributed.Client.scatter

    def counted(self, value, **how):
        sent.append(scatter(self, value, **how))
        # Asked at once: where nobody needs them any more, Dask drops copies.
        had.extend(self.who_has(sent[-1])[sent[-1].key])
        return sent[-1]

    def small(self, function, *call, **how):
        assert call[0] is sent[-1]
        assert len(pickle.dumps(call[1:])) < len(pickle.dumps(model.module)) / 2
        return submit(self, function, *call, **how)

    submit = distributed.Client.submit
    monkeypatch.setattr(distributed.Client, "scatter", counted)
    monkeypatch.setattr(distributed.Client, "submit", small)
    model.encode(client=client)
    assert len(sent) == 1
    assert len(had) == len(client.nthreads())


@pytest.mark.parametrize("arguments", [{}, {"mode": "change"}, {"all_stats": False, "group1": ["T"]}])
def test_groups_are_compared_as_they_are_here(client, model, arguments):
    ask = {"groupby": "cell_type", "n_samples_overall": 200, "silent": True, **arguments}
    here, there = model.differential_expression(**ask), model.differential_expression(**ask, client=client)
    assert list(here.columns) == list(there.columns)
    pairs = [frame.set_index("comparison", append=True).sort_index() for frame in (here, there)]
    for column in here.columns:
        if here[column].dtype.kind == "f" and column != "bayes_factor":
            np.testing.assert_allclose(pairs[0][column], pairs[1][column], rtol=1e-3, atol=6e-3)


def test_what_is_published_is_the_same(client, model, tmp_path):
    publish(model, None, tmp_path / "here", transform_batch=["b1"], n_samples=2)
    publish(model, None, tmp_path / "there", transform_batch=["b1"], n_samples=2, client=client)
    here, there = (open_compact(tmp_path / name).cells for name in ("here", "there"))
    np.testing.assert_allclose(
        here.loc.astype(np.float32), there.loc.astype(np.float32), rtol=2e-3, atol=1e-4
    )
    assert set(here.normalisers) == set(there.normalisers)
    assert len(here.normalisers) == 4
    for key, values in here.normalisers.items():
        np.testing.assert_allclose(values, there.normalisers[key], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("stored", [False, True])
def test_expression_is_written_as_it_is_here(client, model, tmp_path, monkeypatch, stored):
    monkeypatch.setattr("atlasvi.infer.decode.CHUNK_BYTES", 1 << 11)
    cells = np.random.default_rng(1).permutation(700)[:650]
    genes = list(model.fields.var_names[7:2:-1])
    data = model.encode() if stored else None
    for i, how in enumerate(({}, {"cells": cells, "genes": genes, "n_samples": 2, "library_size": "latent"})):
        for name, where in (("here", None), ("there", client)):
            model.write_expression(tmp_path / f"{name}{i}", data, client=where, **how)
        here, there = (anndata.read_zarr(tmp_path / f"{name}{i}") for name in ("here", "there"))
        assert zarr.open_array(tmp_path / f"there{i}" / "X").nchunks > 4
        np.testing.assert_allclose(here.X, there.X, rtol=1e-4)
        assert (here.obs_names == there.obs_names).all()
        assert (here.var_names == there.var_names).all()
        expected = model.expression(data, **how).compute(scheduler="threads")
        np.testing.assert_allclose(here.X, expected, rtol=1e-4)


def test_counts_in_memory_are_refused(client):
    adata = make_adata(60, 10)
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    model = atlasvi.SCVI(adata, n_latent=2, n_hidden=4)
    model.train(1, enable_progress_bar=False)
    with pytest.raises(OptionError, match="make a store of it"):
        model.encode(client=client)
    with pytest.raises(OptionError, match="client='tcp:"):
        model.encode(client="tcp://127.0.0.1:8786")


def test_a_lazy_array_is_computed_where_dask_computes(client, model, monkeypatch):
    monkeypatch.setattr("atlasvi.infer.decode.CHUNK_BYTES", 100 * 40 * 4)
    for rho in (
        model.expression(),
        model.expression(model.encode(), genes=["gene-3", "gene-1"], n_samples=2),
        model.denoised_counts(cells=np.arange(300, 100, -1)),
        model.technical_zeros(),
    ):
        np.testing.assert_allclose(rho.compute(), rho.compute(scheduler="threads"), rtol=1e-5)
    assert len(model.expression().chunks[0]) > 5


def test_the_model_is_no_part_of_the_tasks_of_a_lazy_array(model):
    graph = dict(model.expression().__dask_graph__())
    (node,) = (value for key, value in graph.items() if isinstance(key, str))
    tasks = [value for key, value in graph.items() if not isinstance(key, str)]
    assert max(len(pickle.dumps(task)) for task in tasks) < 500 < len(pickle.dumps(node)) / 20


def test_what_is_computed_here_does_not_go_to_a_cluster_that_is_open(client):
    model = atlasvi.SCVI(prepared(make_adata(60, 12)), n_latent=2, n_hidden=8)
    model.train(1, enable_progress_bar=False)
    assert model.get_normalized_expression(return_numpy=True).shape == (60, 12)
    assert model.get_likelihood_parameters()["mean"].shape == (60, 12)
    with pytest.raises(OptionError, match=r"atlasvi\.ingest"):
        pickle.dumps(dict(model.expression().__dask_graph__()))
    assert model.expression().compute(scheduler="threads").shape == (60, 12)


def prepared(adata):
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    return adata
