"""The simulator: the same cells however they are read, with the statistics that its equations promise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvi.errors import OptionError
from atlasvi.simulate import BLOCK, EMPTY, Simulation, _gamma_poisson, _uniform

N_OBS, N_VARS = 3_300, 400


@pytest.fixture(scope="module")
def simulation():
    return Simulation(N_OBS, N_VARS, counts_per_cell=300, seed=3)


@pytest.fixture(scope="module")
def counts(simulation):
    return simulation.read_rows(0, N_OBS).to_scipy()


def same(a, b):
    return a.shape == b.shape and (a != b).nnz == 0


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, N_OBS), max_size=6))
def test_cells_do_not_depend_on_the_cut(simulation, counts, cuts):
    edges = [0, *sorted(cuts), N_OBS]
    for start, stop in pairwise(edges):
        assert same(simulation.read_rows(start, stop).to_scipy(), counts[start:stop])


def test_cells_do_not_depend_on_the_size_or_the_thread(simulation, counts):
    larger = Simulation(N_OBS * 4, N_VARS, counts_per_cell=300, seed=3)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda k: larger.read_rows(k * 150, (k + 1) * 150), range(22)))
    for k, part in enumerate(parts):
        assert same(part.to_scipy(), counts[k * 150 : (k + 1) * 150])
    for key in simulation.obs_keys:
        assert np.array_equal(larger.obs_column(key)[:N_OBS], simulation.obs_column(key))


def test_another_seed_is_another_atlas(counts):
    other = Simulation(100, N_VARS, counts_per_cell=300, seed=4).read_rows(0, 100).to_scipy()
    assert not same(other, counts[:100])


def test_shape_names_and_columns(simulation):
    assert simulation.shape == (N_OBS, N_VARS)
    assert simulation.layer is None and simulation.indptr is None
    for names, n in ((simulation.obs_names, N_OBS), (simulation.var_names, N_VARS)):
        assert names.dtype == np.dtypes.StringDType() and len(set(names)) == n
    for key in simulation.obs_keys:
        assert len(simulation.obs_column(key)) == N_OBS
    for key in simulation.var_keys:
        assert len(simulation.var_column(key)) == N_VARS
    types = simulation.obs_column("cell_type")
    assert len(simulation.type_names) == 8 == len(set(simulation.type_names))
    assert set(types) == {*simulation.type_names, EMPTY}
    assert set(simulation.obs_column("batch")) == {"batch-1", "batch-2", "batch-3"}
    # The lineage is the letter of the type.
    assert [t if t == EMPTY else t[0] for t in types] == list(simulation.obs_column("coarse_type"))
    simulation.close()


def test_rates_of_doublets_and_of_empty_droplets():
    simulation = Simulation(40_000, 50, doublet_rate=0.1, empty_rate=0.2, n_types=3, seed=1)
    assert simulation.obs_column("is_empty").mean() == pytest.approx(0.2, abs=0.01)
    # Of the droplets that hold a cell.
    with_cell = ~simulation.obs_column("is_empty")
    assert simulation.obs_column("is_doublet")[with_cell].mean() == pytest.approx(0.1, abs=0.008)
    none = Simulation(2_000, 50, doublet_rate=0, empty_rate=0, n_types=3)
    assert not none.obs_column("is_doublet").any() and not none.obs_column("is_empty").any()
    assert EMPTY not in none.obs_column("cell_type").categories


def test_depth_and_ambient_are_what_the_counts_say(simulation, counts):
    total = np.asarray(counts.sum(1)).ravel()
    empty, doublet = simulation.obs_column("is_empty"), simulation.obs_column("is_doublet")
    assert counts.data.min() >= 1 and total.min() >= 1
    ambient = simulation.obs_column("true_ambient")
    assert np.array_equal(total[empty], ambient[empty])
    cell = total - ambient
    assert (cell >= 0).all()
    depth = simulation.obs_column("true_depth")
    assert (depth[empty] == 0).all()
    # exp(sigma^2 / 2) = 1.02 is the mean of the batches' gene effects.
    assert cell[~empty].sum() / depth[~empty].sum() == pytest.approx(1.02, abs=0.05)
    assert np.median(total[doublet]) > 1.5 * np.median(total[~doublet & ~empty])


def test_default_depth_is_that_of_umis():
    counts = Simulation(1_000).read_rows(0, 1_000)
    assert 250 <= np.diff(counts.indptr.numpy()).mean() <= 400
    assert counts.indices.numpy().dtype == np.uint16


def test_true_rho_is_the_expectation_of_the_counts():
    # Without batch effects and next to no ambient counts, counts / depth averages to rho.
    simulation = Simulation(
        4_000, 60, n_types=3, n_batches=1, batch_effect=0, ambient=0, doublet_rate=0.3, empty_rate=0,
        counts_per_cell=2_000, seed=5,
    )  # fmt: skip
    rho = simulation.true_rho(0, 4_000).astype(np.float64)
    assert np.allclose(rho.sum(1), 1, atol=1e-5)
    expected = rho * simulation.obs_column("true_depth")[:, None]
    observed = simulation.read_rows(0, 4_000).to_scipy().toarray().sum(0)
    ambient = np.diff(simulation._truth.soup[0], prepend=0) * 4_000
    shape = simulation.var_column("dispersion").astype(np.float64)
    # An upper bound for doublets, whose two cells have noise of their own.
    variance = (expected + expected**2 / shape).sum(0) + ambient
    score = (observed - ambient - expected.sum(0)) / np.sqrt(variance)
    assert np.abs(score).max() < 4.5
    assert 0.4 < (score**2).mean() < 1.6


def test_true_rho_of_any_rows_and_genes(simulation):
    whole = simulation.true_rho(0, N_OBS)
    rows = np.array([2_500, 3, 3, 1_001, 999, 0, N_OBS - 1])
    genes = np.array([7, 0, 399])
    assert np.array_equal(simulation.true_rho_of(rows, genes=genes), whole[np.ix_(rows, genes)])
    assert whole.dtype == np.float32
    empty = simulation.obs_column("is_empty")
    assert len(np.unique(whole[empty], axis=0)) == 1
    assert len(np.unique(whole[~empty], axis=0)) == (~empty).sum()


def test_markers_mark_their_type_and_lineages_are_alike(simulation):
    types = simulation.obs_column("cell_type")
    keep = ~(simulation.obs_column("is_doublet") | simulation.obs_column("is_empty"))
    rho = pd.DataFrame(np.log(simulation.true_rho(0, N_OBS)[keep]), columns=list(simulation.var_names))
    means = rho.groupby(np.asarray(types)[keep]).mean()
    marker_of = simulation.var_column("marker_of")
    assert (marker_of != "none").sum() == 8 * 8
    for name, owner in zip(simulation.var_names, marker_of, strict=True):
        if owner != "none":
            assert name.startswith(owner) and means[name].idxmax() == owner
    correlation = np.corrcoef(means.drop(columns=[g for g in means if "-m" in g]))
    lineage = np.array([t[0] for t in means.index])
    related = (lineage[:, None] == lineage) & ~np.eye(len(lineage), dtype=bool)
    assert correlation[related].mean() > correlation[lineage[:, None] != lineage].mean()


def test_empty_droplets_have_the_soup_of_their_batch():
    simulation = Simulation(
        BLOCK * 8, 60, n_types=3, n_batches=2, empty_rate=0.9, ambient=0.9, batch_effect=1.0,
        counts_per_cell=500,
    )  # fmt: skip
    counts = simulation.read_rows(0, simulation.n_obs).to_scipy().toarray()
    empty, batch = simulation.obs_column("is_empty"), simulation.obs_column("batch")
    for b, name in enumerate(simulation.batch_names):
        observed = counts[empty & (batch == name)].sum(0)
        expected = np.diff(simulation._truth.soup[b], prepend=0) * observed.sum()
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4
        other = np.diff(simulation._truth.soup[1 - b], prepend=0) * observed.sum()
        assert scipy.stats.chisquare(observed, other).pvalue < 1e-6


@pytest.mark.parametrize(("mu", "shape"), [(0.01, 4.0), (0.7, 0.5), (5.0, 3.0), (400.0, 20.0)])
def test_gamma_poisson_is_the_negative_binomial_quantile(mu, shape):
    u = np.concatenate([np.linspace(0, 0.999, 200), 1 - 10.0 ** -np.arange(4, 12)])
    expected = scipy.stats.nbinom(shape, shape / (shape + mu)).ppf(u).clip(min=0)
    got = np.array([_gamma_poisson(mu, shape, x) for x in u])
    # At a step of the distribution rounding decides.
    assert (np.abs(got - expected) <= (u > 0.9999) + 0).mean() > 0.98
    assert np.abs(got - expected).max() <= 1


def test_uniform_draws_are_uniform_and_uncorrelated():
    keys = np.random.default_rng(0).integers(0, 1 << 64, 100, dtype=np.uint64)
    u = np.array([[_uniform(key, g) for g in range(500)] for key in keys])
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02


def test_to_anndata(simulation, counts):
    rows = np.array([5, 2_000, 1])
    adata = simulation.to_anndata(rows)
    assert same(adata.X.tocsr(), counts[rows].astype(np.float32))
    assert list(adata.obs_names) == ["cell-0000005", "cell-0002000", "cell-0000001"]
    assert list(adata.var_names) == list(simulation.var_names)
    assert list(adata.obs["batch"]) == list(simulation.obs_column("batch")[rows])
    assert same(simulation.to_anndata().X.tocsr(), counts.astype(np.float32))


def test_no_rows(simulation):
    assert simulation.read_rows(7, 7).shape == (0, N_VARS)
    assert simulation.true_rho(7, 7).shape == (0, N_VARS)
    assert simulation.to_anndata(np.array([], np.int64)).shape == (0, N_VARS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_obs": 0}, "n_obs is 0 in Simulation; give a number >= 1"),
        ({"n_types": 1}, "n_types is 1"),
        ({"n_vars": 30}, "n_vars is 30 in Simulation; give a number >= 40"),
        ({"seed": -1}, "seed is -1"),
        ({"doublet_rate": 1.0}, r"doublet_rate is 1.0 in Simulation; give a number in \[0, 1\)"),
        ({"empty_rate": float("nan")}, "empty_rate is nan"),
        ({"counts_per_cell": 0.0}, "counts_per_cell is 0.0"),
        ({"counts_per_cell": float("inf")}, "counts_per_cell is inf.*at most 1,000,000"),
        ({"n_obs": 10.5}, "n_obs is 10.5 in Simulation; give a whole number"),
        ({"seed": None}, "seed is None"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"batch_effect": 5}, "batch_effect is 5 in Simulation; give a number >= 0 and <= 2"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        Simulation(**{"n_obs": 10, "n_vars": 100, **options})


def test_a_mask_chooses_cells(simulation):
    chosen = np.array([5, 70, 3299])
    mask = np.zeros(N_OBS, bool)
    mask[chosen] = True
    assert simulation.to_anndata(mask).obs_names.tolist() == simulation.to_anndata(chosen).obs_names.tolist()
    with pytest.raises(OptionError, match="positions or a mask, are float64"):
        simulation.to_anndata(np.array([0.5]))


def test_wrong_requests_are_named(simulation):
    with pytest.raises(OptionError, match=r"'type' is not in obs .* it has cell_type"):
        simulation.obs_column("type")
    with pytest.raises(OptionError, match="'gene' is not in var"):
        simulation.var_column("gene")
    with pytest.raises(OptionError, match="rows 0 to 3301 asked of 3300"):
        simulation.read_rows(0, N_OBS + 1)
    with pytest.raises(OptionError, match="rows -1 to -1"):
        simulation.true_rho_of(np.array([-1]))
