"""A model on several stores as one atlas: bitwise what it is on one store of the same cells."""

import sys
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import atlasvi
from atlasvi import cli
from atlasvi.models.scvi import SCVI
from atlasvi.store.ingest import ingest


@pytest.fixture
def both(adata, tmp_path):
    """The same cells in three stores, as one, and in one store."""
    paths = []
    for k, rows in enumerate(np.split(np.arange(300), [90, 170])):
        paths.append(tmp_path / f"part-{k}.zarr")
        ingest(adata[rows].copy(), paths[-1], input_key="file")
    ingest(adata, tmp_path / "one.zarr", input_key="file")
    with atlasvi.open(paths) as joined, atlasvi.open(tmp_path / "one.zarr") as one:
        yield joined, one


def trained(atlas):
    SCVI.setup_anndata(atlas, batch_key="batch", labels_key="cell_type", gene_mask=None)
    model = SCVI(atlas, n_hidden=16, n_latent=3)
    model.train(2, batch_size=64, enable_progress_bar=False, num_workers=2)
    return model


def test_training_latents_and_decoding_are_bitwise_the_same(both):
    joined, one = (trained(atlas) for atlas in both)
    for name, weights in one.module.state_dict().items():
        assert torch.equal(joined.module.state_dict()[name], weights), name
    pd.testing.assert_frame_equal(joined.history["elbo_validation"], one.history["elbo_validation"])
    np.testing.assert_array_equal(joined.get_latent_representation(), one.get_latent_representation())
    rows = [3, 89, 90, 250]
    np.testing.assert_array_equal(
        joined.expression(genes=["gene-3", "gene-0"])[rows].compute(),
        one.expression(genes=["gene-3", "gene-0"])[rows].compute(),
    )
    assert joined.get_elbo() == one.get_elbo()


def test_the_store_is_a_batch(both, tmp_path):
    joined, _ = both
    SCVI.setup_anndata(joined, batch_key="input", gene_mask=None)
    model = SCVI(joined, n_hidden=16, n_latent=3)
    model.train(1, batch_size=64, enable_progress_bar=False)
    assert model.fields.batch_categories == ("part-0", "part-1", "part-2")
    model.save(tmp_path / "model")
    again = SCVI.load(tmp_path / "model", joined)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())


def test_genes_in_another_order_in_one_store(adata, tmp_path):
    """Rows of such a store do not have their genes in order; sums may round otherwise, no more."""
    order = np.random.default_rng(0).permutation(60)
    ingest(adata[:150].copy(), tmp_path / "a.zarr")
    ingest(adata[150:, order].copy(), tmp_path / "b.zarr")
    model = trained(atlasvi.Atlas.from_anndata(adata))
    with atlasvi.open([tmp_path / "a.zarr", tmp_path / "b.zarr"]) as joined:
        np.testing.assert_allclose(
            model.get_latent_representation(joined), model.get_latent_representation(), rtol=1e-4, atol=1e-5
        )


def test_commands_take_several_stores_as_one(adata, tmp_path, monkeypatch, capsys):
    ingest(adata[:150].copy(), tmp_path / "a.zarr")
    ingest(adata[150:].copy(), tmp_path / "b.zarr")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atlasvi", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    said = run("info", "a.zarr", "b.zarr")
    assert "cells" in said and "300" in said and "obs input" in said and "on disk" in said
    small = ["--n-hidden", "16", "--n-latent", "3", "--gene-mask", "none", "--max-epochs", "1"]
    run("train", "a.zarr", "b.zarr", "-o", "model", "--batch-key", "input", *small)
    assert "300 cells x 3 -> a.zarr, b.zarr" in run("latent", "model", "a.zarr", "b.zarr")
    with atlasvi.open(["a.zarr", "b.zarr"]) as joined:
        latent = SCVI.load("model", joined).get_latent_representation()
        np.testing.assert_array_equal(joined.read_obsm("X_scVI", 0, 300), latent)
    assert anndata.read_zarr("b.zarr").obsm["X_scVI"].shape == (150, 3)
