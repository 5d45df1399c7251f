"""With copied weights, differential expression says what scvi-tools says, as nearly as its own seeds agree.

The fixture is what `benchmarks/peers/scvi_tools_de_fixtures.py` wrote: sixteen seeds of scvi-tools 1.4.2.
"""

import json
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import atlasvi
from tests.oracle.test_scvi_tools import ARRAYS, FIXTURES, INDEX, LEVELS, make_module

CASE = "covariates/encoded"
with np.load(FIXTURES / "scvi_tools_de.npz") as file:
    LAYOUT = json.loads(file["layout"].tobytes())
    THEIRS = {name: file[name] for name in file.files if name != "layout"}
SETTINGS = sorted(THEIRS)


@pytest.fixture(scope="module")
def model():
    data = ARRAYS["data"]
    counts = data["counts"].numpy()
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(counts))])
    for key, n in LEVELS.items():
        obs[key] = pd.Categorical.from_codes(data[key].numpy().astype(int), [f"{key}{i}" for i in range(n)])
    for key in ("age", "mito"):
        obs[key] = data[key].numpy()
    var = pd.DataFrame(index=[f"gene{i}" for i in range(counts.shape[1])])
    adata = anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, var)
    spec = INDEX["cases"][CASE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atlasvi.SCVI.setup_anndata(adata, **spec["setup"])
        made = atlasvi.SCVI(adata, n_hidden=8, n_latent=3, dropout_rate=0.0, **spec["init"])
    made.module.load_state_dict(make_module(CASE)[0].state_dict())
    made.records = [None]  # as if it had been trained
    return made


def ours(model, name, seed):
    """``(genes of all comparisons, columns)`` in the fixture's order."""
    columns = LAYOUT[name]["columns"]
    found = model.differential_expression(silent=True, seed=seed, **LAYOUT[name]["arguments"])
    by_label = "comparison" in found
    parts = [part for _, part in found.groupby("comparison", sort=True)] if by_label else [found]
    return np.concatenate(
        [part.loc[list(model.fields.var_names), columns].to_numpy(np.float64) for part in parts]
    )


@pytest.fixture(scope="module")
def runs(model):
    return {name: np.stack([ours(model, name, seed) for seed in range(16)]) for name in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_columns_are_theirs(model, name):
    found = model.differential_expression(silent=True, **LAYOUT[name]["arguments"])
    extra = [] if "change" in name else ["is_de_bf_3"]
    assert [column for column in found.columns if column not in extra] == LAYOUT[name]["all"]
    assert set(extra) <= set(found.columns)


@pytest.mark.parametrize("name", SETTINGS)
def test_raw_means_are_theirs(runs, name):
    columns = LAYOUT[name]["columns"]
    raw = [i for i, column in enumerate(columns) if column.startswith(("raw_", "non_zeros"))]
    assert len(raw) == 6
    np.testing.assert_allclose(runs[name][0][:, raw], THEIRS[name][0][:, raw], rtol=2e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_column_agrees_as_well_as_their_seeds_do(runs, name):
    """Means over sixteen seeds differ by no more than their standard errors let them."""
    mine, theirs = runs[name], THEIRS[name]
    for i, column in enumerate(LAYOUT[name]["columns"]):
        if column.startswith(("raw_", "non_zeros", "is_de", "lfc_min", "lfc_max")) or column == "delta":
            continue
        spread = np.sqrt((mine[:, :, i].var(0, ddof=1) + theirs[:, :, i].var(0, ddof=1)) / len(mine))
        floor = 1e-5 * np.abs(theirs[:, :, i]).mean()
        gap = np.abs(mine[:, :, i].mean(0) - theirs[:, :, i].mean(0)) / (spread + floor)
        # Student's t with fifteen degrees of freedom and more, over up to sixty genes.
        assert gap.max() < 6, f"{column}: {gap.max():.1f} standard errors"
        if column != "pseudocounts":  # one number for all genes
            assert np.median(gap) < 1.3, f"{column}: median of {np.median(gap):.2f} standard errors"


@pytest.mark.parametrize("name", SETTINGS)
def test_bayes_factors_are_no_farther_from_theirs_than_theirs_from_each_other(runs, name):
    i = LAYOUT[name]["columns"].index("bayes_factor")
    mine, theirs = runs[name][:, :, i], THEIRS[name][:, :, i]
    small = np.abs(theirs.mean(0)) < 3
    for genes in (np.ones(len(small), bool), small):
        among = [(a - b)[genes] for j, a in enumerate(theirs) for b in theirs[:j]]
        between = [(a - b)[genes] for a in mine for b in theirs]
        own, other = (np.sqrt(np.mean(np.square(gaps))) for gaps in (among, between))
        assert other <= 1.05 * own, f"{other:.4f} from theirs, theirs {own:.4f} from each other"


def test_the_fixture_has_something_to_say():
    name = "vanilla, few cells"
    factors = np.abs(THEIRS[name][:, :, LAYOUT[name]["columns"].index("bayes_factor")].mean(0))
    assert factors.max() > 3 > 1 > factors.min()
    assert LAYOUT["scvi-tools"] == "1.4.2"
