"""What the likelihood learnt, and what the latent keeps (the paper's Figures 1, 2 and 6, and its supplement).

Parts, each with rows of its own:

- library: latent library sizes beside totals, within types, and beside known amounts of RNA;
- detection: how often a gene is seen beside its mean frequency, and what three models say of it;
- zeros: what the two sources of zeros of the ZINB follow;
- predictive: variances and zeros of counts drawn from models of each likelihood;
- noise: data without structure gives one blob;
- time: a continuum stays one;
- mixtures: mixtures of RNA lie as far apart as their shares;
- proteins: neighbours by RNA are neighbours by protein;
- doublets: cells that are reconstructed badly;
- shift: a treatment as a shift of the latent, for a type that was never seen treated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.sparse.csgraph import dijkstra
from scipy.special import gammaln
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score, silhouette_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor, NearestNeighbors, kneighbors_graph

import atlasvi
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job, fit, made, model_folder
from benchmarks.paper.methods import METHODS as FITTED
from benchmarks.paper.methods import MIXTURE, OURS, PEER
from benchmarks.paper.options import Options
from benchmarks.paper.pictures import dots
from benchmarks.paper.record import Record, Row
from benchmarks.paper.tables import Compared, difference_table, differences, mean_of, n_seeds, table

METHODS = (OURS, MIXTURE, "PCA", PEER)
LIKELIHOODS = ("poisson", "zip", "nb", "zinb")
_FOLDS = KFold(5, shuffle=True, random_state=0)
QUICK_PARTS = ("library", "detection", "zeros", "predictive", "noise")
TREATED = "CD14 Mono"
DEFINITIONS = {
    "with_totals": "library: Pearson's r of log l and log total within a type, mean over types of 20 or more",
    "scale": "library: median of l / total",
    "with_rna, totals_with_rna": "library: Spearman's correlation of l, and of the total, with the amount of "
    "RNA put in, within protocols",
    "binomial, hypergeometric, model": "detection: mean over genes of abs(share of cells in which the gene "
    "is seen - what is predicted): from rho and the cells' totals by a binomial, by a hypergeometric "
    "draw from ten times as many molecules, and by the model's counts",
    "nb_genes, dropout_genes, nb_spikes, dropout_spikes": "zeros: Spearman's correlation over the cells of a "
    "type and batch of the mean probability of a zero by the negative binomial, or by dropout, with the "
    "number of genes seen, or the share of spike-ins; mean over groups of 20 or more",
    "zero_off": "predictive: mean over genes of abs(zero share of drawn counts - zero share of counts)",
    "variance_off": "predictive: median over genes of abs(log ratio of the variances)",
    "blob": "noise: silhouette of 3 clusters (k-means), less that of normal draws of the same covariance",
    "blob_ari": "noise: adjusted Rand index of these clusters with published types, of other genes",
    "blob_again": "noise: the same index with three clusters of a model trained anew, with the NB",
    "truth": "noise: Spearman's correlation of mean rho with the molecules put in",
    "theta": "noise: median of the model's theta over that by moments, of normalised counts",
    "time": "time: Spearman's correlation of the shortest path in the graph of 15 nearest neighbours, from "
    "the youngest 20 cells, with embryo time",
    "mixtures": "mixtures: Spearman's correlation of latent distance and that of RNA shares, 20,000 pairs",
    "time_near": "time: Spearman's correlation of age with the mean age of the 15 nearest of other cells",
    "mixtures_near": "mixtures: R^2 of the mean shares of the 10 nearest of other cells",
    "fold": "proteins: |A and B| |C| / (|A| |B|), A and B the edges of the graphs of 100 nearest neighbours "
    "by latent and by centred log-ratios of proteins, C all pairs",
    "flattened": "proteins: Spearman's correlation of the two graphs, an entry a pair",
    "auroc, auroc_depth": "doublets: of hashtag doublets; mean within fifths of the cells by total",
    "shift_r2": "shift: R^2 of predicted and true mean log(1 + counts to 10,000), all genes",
    "shift_r2_100": "shift: the same over the 100 genes that differ most between controls and treated",
}


def run(options: Options) -> None:
    """Make the rows that are not there yet, the first seed of everything first."""
    record = Record(options.results / "learnt.json", DEFINITIONS)
    for seed in range(options.seeds):
        for part, make in PARTS.items():
            if options.quick and part not in QUICK_PARTS:
                continue
            for data, methods in ({"little": (OURS,)} if options.quick else DATA[part]).items():
                if options.data and data not in options.data:
                    continue
                for method in methods:
                    key = {"part": part, "data": data, "method": method, "seed": seed}
                    if record.has(**key) or (options.methods and method not in options.methods):
                        continue
                    for row in make(options, data, method, seed):
                        genes = SETS[data].gene_sets[0] or "all" if data in SETS else "all"
                        record.add({**key, "genes": genes, **row})
                        print(record.rows[-1], flush=True)


# --- fits ---------------------------------------------------------------------------------------


def _job(options: Options, data: str, method: str, seed: int, **given: Any) -> Job:
    epochs = {"max_epochs": 5} if options.quick else {}
    fitted = FITTED[method]
    given = {**fitted.options, **given}
    return Job(fitted.side, data, seed, SETS[data].gene_sets[0], options=given, **epochs)


def _latent(options: Options, data: str, method: str, seed: int, **given: Any) -> np.ndarray | None:
    job = _job(options, data, method, seed, **given)
    found = fit(job, options.work, options.pythons)
    if found is None:
        print(f"{job.name}: not run: its environment was not given", flush=True)
        return None
    return np.asarray(found["latent"], np.float64)


def _model(options: Options, data: str, seed: int, **given: Any) -> tuple[Any, anndata.AnnData]:
    """Ours, trained, and its cells."""
    job = _job(options, data, OURS, seed, **given)
    SETS[data].prepare(options.work)
    fit(job, options.work, options.pythons)
    adata = SETS[data].load(n_genes=job.n_genes)
    return atlasvi.SCVI.load(model_folder(job), adata), adata


def _groups(*columns: Any, least: int = 20) -> Iterator[np.ndarray]:
    """Positions of the cells that agree in all columns, of groups that are not small."""
    joined = np.array(["|".join(map(str, row)) for row in zip(*columns, strict=True)])
    for name in np.unique(joined):
        cells = np.flatnonzero(joined == name)
        if len(cells) >= least:
            yield cells


# --- the likelihood -----------------------------------------------------------------------------


def library(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """Latent library sizes, another initialisation each seed."""
    model, adata = _model(options, data, seed, use_observed_lib_size=False)
    found = model.get_latent_library_size().ravel()
    totals = np.asarray(adata.X.sum(1)).ravel()
    obs = adata.obs
    within = [np.corrcoef(np.log(found[at]), np.log(totals[at]))[0, 1] for at in _groups(obs["label"])]
    row = {"with_totals": float(np.mean(within)), "scale": float(np.median(found / totals))}
    if "mRNA_amount" in obs:
        amounts = obs["mRNA_amount"].to_numpy(float)
        for name, sizes in (("with_rna", found), ("totals_with_rna", totals)):
            ranks = [spearmanr(sizes[at], amounts[at])[0] for at in _groups(obs["batch"])]
            row[name] = float(np.mean(ranks))
    yield row


def detection(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """How often genes are seen."""
    model, adata = _model(options, data, seed)
    totals = np.asarray(adata.X.sum(1)).ravel()
    rho = np.zeros(adata.n_vars)
    binomial, drawn = np.zeros(adata.n_vars), np.zeros(adata.n_vars)
    for start in range(0, adata.n_obs, 1000):
        cells = np.arange(start, min(start + 1000, adata.n_obs))
        some = np.asarray(model.expression(cells=cells).compute(), np.float64)
        rho += some.sum(0)
        n = totals[cells][:, None]
        binomial += (1 - np.exp(n * np.log1p(-some))).sum(0)
        drawn += (1 - np.exp(_log_unseen(n, 10 * n, 10 * n * some))).sum(0)
    seen = np.asarray((adata.X > 0).mean(0)).ravel()
    check = model.posterior_predictive_check(n_samples=3, seed=seed)
    zeros = check[check["statistic"] == "zero_share"]["replicated"].to_numpy()
    said = {"binomial": binomial / adata.n_obs, "hypergeometric": drawn / adata.n_obs, "model": 1 - zeros}
    yield {name: float(np.abs(share - seen).mean()) for name, share in said.items()}


def _log_unseen(n: np.ndarray, pool: np.ndarray, of_gene: np.ndarray) -> np.ndarray:
    """Log probability that none of ``of_gene`` among ``pool`` molecules is among ``n`` drawn."""
    rest = np.maximum(pool - of_gene, n)
    return gammaln(rest + 1) - gammaln(rest - n + 1) - gammaln(pool + 1) + gammaln(pool - n + 1)


def zeros(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """What follows the number of genes seen, and the share of spike-ins."""
    model, adata = _model(options, data, seed)
    nb, dropout = np.empty(adata.n_obs), np.empty(adata.n_obs)
    for start in range(0, adata.n_obs, 1000):
        cells = np.arange(start, min(start + 1000, adata.n_obs))
        found = model.get_likelihood_parameters(indices=cells)
        mu, theta = found["mean"].astype(np.float64), found["dispersions"].astype(np.float64)
        nb[cells] = np.exp(-theta * np.log1p(mu / theta)).mean(1)
        dropout[cells] = found["dropout"].mean(1)
    obs = adata.obs
    seen = np.asarray((adata.X > 0).sum(1)).ravel()
    beside = {"genes": seen}
    if "ercc_reads" in obs:
        spikes = obs["ercc_reads"].to_numpy(float)
        beside["spikes"] = spikes / (spikes + np.asarray(adata.X.sum(1)).ravel())
    row: Row = {}
    batch = obs["batch"] if "batch" in obs else np.zeros(adata.n_obs)
    groups = list(_groups(obs["label"], batch))
    for name, values in beside.items():
        for source, p in (("nb", nb), ("dropout", dropout)):
            ranks = [spearmanr(p[at], values[at])[0] for at in groups if np.ptp(values[at]) > 0]
            row[f"{source}_{name}"] = float(np.nanmean(ranks))
    yield row


def predictive(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """Of each likelihood."""
    for likelihood in LIKELIHOODS if not options.quick else ("poisson", "nb"):
        given = {} if likelihood == "zinb" else {"gene_likelihood": likelihood}
        model, _ = _model(options, data, seed, **given)
        check = model.posterior_predictive_check(n_samples=5, seed=seed)
        of = {what: check[check["statistic"] == what] for what in ("variance", "zero_share")}
        share = of["zero_share"]
        variance = of["variance"][of["variance"]["observed"] > 0]
        ratio = np.log(np.maximum(variance["replicated"], 1e-9) / variance["observed"])
        yield {
            "likelihood": likelihood,
            "zero_off": float((share["replicated"] - share["observed"]).abs().mean()),
            "variance_off": float(ratio.abs().median()),
        }


# --- the latent ---------------------------------------------------------------------------------


def noise(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """No structure: spike-ins, or counts drawn from one ZINB for all cells."""
    row: Row = {}
    if data == "zeisel_ERCC":
        latent = _latent(options, data, method, seed)
        labels = np.asarray(SETS[data].load().obs["label"].astype(str))
    else:
        counts = simulated_noise(500 if options.quick else 2000, 100 if options.quick else 500, seed)
        latent, labels = _of_noise(counts, method, seed, 5 if options.quick else None), None
    if latent is None:
        return
    row["blob"], clusters = blob(latent, seed)
    if labels is not None:
        row["blob_ari"] = float(adjusted_rand_score(labels, clusters))
    if data == "zeisel_ERCC" and method == OURS:
        other = _latent(options, data, method, seed, gene_likelihood="nb")
        assert other is not None
        row["blob_again"] = float(adjusted_rand_score(blob(other, seed)[1], clusters))
        row |= _of_spikes(*_model(options, data, seed))
    yield row


def simulated_noise(n_obs: int, n_vars: int, seed: int) -> sp.csr_matrix:
    """ZINB with the same frequencies for all cells, theta 2, a third dropped out, totals log-normal."""
    rng = np.random.default_rng(seed)
    rho = rng.lognormal(0, 1.5, n_vars)
    mean = rng.lognormal(np.log(2 * n_vars), 0.4, (n_obs, 1)) * rho / rho.sum()
    drawn = rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape)) * (rng.random(mean.shape) > 1 / 3)
    return sp.csr_matrix(drawn.astype(np.float32))


def _of_noise(counts: sp.csr_matrix, method: str, seed: int, epochs: int | None) -> np.ndarray:
    if method == "PCA":
        from sklearn.decomposition import PCA

        totals = np.asarray(counts.sum(1))
        return np.asarray(
            PCA(10, random_state=seed).fit_transform(
                np.log1p(counts.toarray() * (np.median(totals) / totals))
            )
        )
    adata = anndata.AnnData(counts)
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    model = atlasvi.SCVI(adata, seed=seed, **FITTED[method].options)
    model.train(epochs, seed=seed, enable_progress_bar=False)
    return np.asarray(model.get_latent_representation(), np.float64)


def blob(latent: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """How much better three clusters are than in normal draws of the same covariance; and the clusters."""
    rng = np.random.default_rng(seed)
    few = rng.permutation(len(latent))[:2000]

    def width(x: np.ndarray) -> tuple[float, np.ndarray]:
        found = KMeans(3, n_init=10, random_state=seed).fit_predict(x)
        return float(silhouette_score(x[few], found[few])), found

    own, clusters = width(latent)
    covariance = np.cov(latent, rowvar=False)
    drawn = [width(rng.multivariate_normal(latent.mean(0), covariance, len(latent)))[0] for _ in range(3)]
    return own - float(np.mean(drawn)), clusters


def _of_spikes(model: Any, adata: anndata.AnnData) -> Row:
    rho = np.asarray(model.expression().compute(), np.float64).mean(0)
    x = adata.X.toarray().astype(np.float64)
    totals = x.sum(1, keepdims=True)
    share = x / totals
    mean = share.mean(0)
    # Of x / n with n the total: variance mean / n + mean^2 / theta, its first part averaged over cells.
    extra = share.var(0) - mean * (1 / totals).mean()
    moments = np.where(extra > 0, mean**2 / np.maximum(extra, 1e-12), np.inf)
    theta = model.get_likelihood_parameters(indices=[0])["dispersions"][0]
    many = mean * totals.mean() > 5
    molecules = adata.var["true_molecules"].to_numpy(float)
    return {
        "truth": float(spearmanr(rho, molecules)[0]),
        "theta": float(np.median(theta[many] / moments[many])),
    }


def time(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """From the youngest cells along the graph."""
    latent = _latent(options, data, method, seed)
    if latent is not None:
        age = SETS[data].load().obs["embryo_time"].to_numpy(float)
        near = cross_val_predict(KNeighborsRegressor(15), latent, age, cv=_FOLDS)
        yield {"time": along_graph(latent, age), "time_near": float(spearmanr(near, age)[0])}


def along_graph(latent: np.ndarray, age: np.ndarray) -> float:
    """Rank correlation of age with the shortest path from the youngest; cells that none leads to are last."""
    graph = kneighbors_graph(latent, 15, mode="distance")
    paths = dijkstra(graph, directed=False, indices=np.argsort(age, kind="stable")[:20]).mean(0)
    reached = np.isfinite(paths)
    paths[~reached] = 2 * paths[reached].max()
    return float(spearmanr(paths, age)[0])


def mixtures(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """Distances."""
    latent = _latent(options, data, method, seed)
    if latent is not None:
        obs = SETS[data].load().obs
        shares = obs[["H2228_prop", "H1975_prop", "HCC827_prop"]].to_numpy(float)
        one, two = np.random.default_rng(seed).integers(0, len(latent), (2, 20_000))
        far, apart = (np.linalg.norm(x[one] - x[two], axis=1) for x in (latent, shares))
        near = cross_val_predict(KNeighborsRegressor(10), latent, shares, cv=_FOLDS)
        off = np.square(near - shares).sum() / np.square(shares - shares.mean(0)).sum()
        yield {"mixtures": float(spearmanr(far, apart)[0]), "mixtures_near": float(1 - off)}


def proteins(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """Two graphs."""
    latent = _latent(options, data, method, seed)
    if latent is not None:
        counts = np.asarray(SETS[data].load().obsm["protein_expression"], np.float64)
        logs = np.log1p(counts)
        fold, flattened = of_graphs(latent, logs - logs.mean(1, keepdims=True), 100)
        yield {"fold": fold, "flattened": flattened}


def of_graphs(one: np.ndarray, two: np.ndarray, n_neighbours: int) -> tuple[float, float]:
    """Fold enrichment of shared edges over chance, and the rank correlation of the flattened graphs.

    Entries are 0 or 1, so that Spearman's correlation is Pearson's; both graphs have as many edges.
    """
    n = len(one)
    a, b = (
        NearestNeighbors(n_neighbors=n_neighbours).fit(x).kneighbors_graph(mode="connectivity")
        for x in (one, two)
    )
    shared, edges, pairs = float(a.multiply(b).sum()), n * n_neighbours, n * (n - 1)
    share = edges / pairs
    return shared * pairs / edges**2, (shared / pairs - share**2) / (share - share**2)


def doublets(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """The model's scores, totals alone, and scrublet's."""
    if method == "scrublet":
        arrays = made(Job("scrublet", data, seed), "doublet_scores", options.pythons.classic, options.work)
        if arrays is None:
            print(f"{data}, scrublet: not run: its environment was not given", flush=True)
            return
        adata = SETS[data].load()
        found = pd.DataFrame(
            {"total_counts": np.asarray(adata.X.sum(1)).ravel(), "scrublet": arrays["score"]}
        )
    else:
        model, adata = _model(options, data, seed)
        found = model.cell_quality(seed=seed)
    known = (adata.obs["doublet"] != "Negative").to_numpy()
    truth = (adata.obs["doublet"] == "Doublet").to_numpy()[known]
    found = found[known]
    fifths = np.array_split(np.argsort(found["total_counts"].to_numpy(), kind="stable"), 5)
    for score in found.columns[1:] if method == "scrublet" else found.columns:
        values = found[score].to_numpy()
        within = [roc_auc_score(truth[cells], values[cells]) for cells in fifths]
        row = {"auroc": float(roc_auc_score(truth, values)), "auroc_depth": float(np.mean(within))}
        yield {"score": score, **row}


def shift(options: Options, data: str, method: str, seed: int) -> Iterator[Row]:
    """One type's treated cells are left out of training, and predicted from its controls."""
    adata = SETS[data].load(n_genes=SETS[data].gene_sets[0])
    obs = adata.obs
    treated, target = (obs["group"] == "stim").to_numpy(), (obs["label"] == TREATED).to_numpy()
    seen = adata[~(treated & target)].copy()
    atlasvi.SCVI.setup_anndata(seen, gene_mask=None)
    model = atlasvi.SCVI(seen, seed=seed)
    model.train(seed=seed, enable_progress_bar=False)
    cells = model.encode(adata)
    # The mean over types of the shift: types of more cells do not weigh more.
    others = [at for at in _groups(obs["label"]) if not target[at[0]]]
    move = np.mean(
        [cells.loc[at[treated[at]]].mean(0) - cells.loc[at[~treated[at]]].mean(0) for at in others], 0
    )
    controls, truth = np.flatnonzero(target & ~treated), np.flatnonzero(target & treated)
    logs = adata.X.copy()
    logs = sp.csr_matrix(logs.multiply(1e4 / np.maximum(logs.sum(1), 1)))
    logs.data = np.log1p(logs.data)

    def mean(at: np.ndarray) -> np.ndarray:
        return np.asarray(logs[at].mean(0)).ravel()

    known = [mean(at[treated[at]]) - mean(at[~treated[at]]) for at in others]
    still = model.encode(adata[controls])
    before = np.log1p(1e4 * model.expression(still).compute()).mean(0)
    moved = model.encode(adata[controls])
    moved.loc = moved.loc + move.astype(moved.loc.dtype)
    after = np.log1p(1e4 * model.expression(moved).compute()).mean(0)
    said = {
        # What the decoder says changes, added to the controls: its own means are smoother than counts are.
        OURS: mean(controls) + after - before,
        "controls as they are": mean(controls),
        "mean shift of log counts": mean(controls) + np.mean(known, 0),
    }
    true = mean(truth)
    most = np.argsort(-np.abs(true - mean(controls)))[:100]
    for name, guess in said.items():
        row = {"shift_r2": _r2(guess, true), "shift_r2_100": _r2(guess[most], true[most])}
        yield {"prediction": name, **row}


def _r2(guess: np.ndarray, truth: np.ndarray) -> float:
    return float(1 - np.square(guess - truth).sum() / np.square(truth - truth.mean()).sum())


PARTS: Mapping[str, Callable[[Options, str, str, int], Iterator[Row]]] = {
    "library": library, "detection": detection, "zeros": zeros, "predictive": predictive, "noise": noise,
    "time": time, "mixtures": mixtures, "proteins": proteins, "doublets": doublets, "shift": shift,
}  # fmt: skip
DATA: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "library": {"pbmc_sorted_reference": (OURS,), "scmixology_RNAmix": (OURS,)},
    "detection": {"pbmc_sorted_reference": (OURS,), "scmixology_celllines": (OURS,)},
    "zeros": {"pbmc_sorted_reference": (OURS,), "scmixology_celllines": (OURS,)},
    "predictive": {"pbmc_sorted_reference": (OURS,), "zeisel_ERCC": (OURS,)},
    "noise": {"zeisel_ERCC": METHODS, "one ZINB": METHODS[:3]},
    "time": {"worm_embryo_ages": METHODS, "monocle3_worm_embryo": METHODS},
    "mixtures": {"scmixology_RNAmix": METHODS},
    "proteins": {"cbmc_citeseq": METHODS},
    "doublets": {"hashing_celllines_doublets": (OURS, "scrublet")},
    "shift": {"kang_treatment": (OURS,)},
}
PICTURED = {"noise": "zeisel_ERCC", "time": "worm_embryo_ages"}
# Of each part: what its table shows, and which column tells its lines apart besides data and method.
SHOWN: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    "library": (("with_totals", "scale", "with_rna", "totals_with_rna"), None),
    "detection": (("binomial", "hypergeometric", "model"), None),
    "zeros": (("nb_genes", "dropout_genes", "nb_spikes", "dropout_spikes"), None),
    "predictive": (("zero_off", "variance_off"), "likelihood"),
    "noise": (("blob", "blob_ari", "blob_again", "truth", "theta"), None),
    "time": (("time", "time_near"), None),
    "mixtures": (("mixtures", "mixtures_near"), None),
    "proteins": (("fold", "flattened"), None),
    "doublets": (("auroc", "auroc_depth"), "score"),
    "shift": (("shift_r2", "shift_r2_100"), "prediction"),
}
WORDS = {
    "with_totals": "r with totals", "scale": "l / total", "with_rna": "rank r with RNA",
    "totals_with_rna": "totals' rank r with RNA", "binomial": "binomial off by",
    "hypergeometric": "hypergeometric off by", "model": "model off by", "nb_genes": "NB and genes seen",
    "dropout_genes": "dropout and genes seen", "nb_spikes": "NB and spike-ins",
    "dropout_spikes": "dropout and spike-ins", "zero_off": "zero share off by",
    "variance_off": "variance off by (log)", "blob": "clusters beyond a normal's",
    "blob_ari": "ARI with types", "blob_again": "ARI with another model's",
    "truth": "rank r with molecules", "theta": "theta / by moments", "time": "rank r with embryo time",
    "time_near": "rank r with neighbours' time", "mixtures_near": "R² of neighbours' shares",
    "mixtures": "rank r with shares", "fold": "fold enrichment", "flattened": "rank r", "auroc": "AUROC",
    "auroc_depth": "at matched depth", "shift_r2": "R², all genes", "shift_r2_100": "R², 100 genes",
}  # fmt: skip


def _compared(record: Record, ours: str = OURS) -> list[Compared]:
    found = []
    for part, measures in (
        ("noise", ("blob", "blob_ari")),
        ("time", ("time", "time_near")),
        ("mixtures", ("mixtures", "mixtures_near")),
        ("proteins", ("fold", "flattened")),
    ):  # fmt: skip
        rows = record.only(part=part)
        sets = dict.fromkeys((row["data"], row["genes"]) for row in rows.rows)
        for theirs in (PEER, "PCA"):
            compared = differences(rows, sets, measures, ours=ours, theirs=theirs)
            found += [replace(one, data=f"{one.data}, to {theirs}") for one in compared]
    return found


def tables(record: Record) -> dict[str, str]:
    """Markdown: one a part, and the differences."""
    found = {
        "differences": difference_table(_compared(record), theirs="the other"),
        "mixture": difference_table(_compared(record, MIXTURE), ours=MIXTURE, theirs="the other"),
    }
    for part, (measures, by) in SHOWN.items():
        rows, lines = record.only(part=part), []
        columns = [m for m in measures if any(row.get(m) is not None for row in rows.rows)]
        keys = ["data", "method", *([by] if by else [])]
        for values in dict.fromkeys(tuple(row[k] for k in keys) for row in rows.rows):
            key = dict(zip(keys, values, strict=True))
            lines.append([*values, *(mean_of(rows, m, **key) for m in columns), n_seeds(rows, **key)])
        found[part] = table((*keys, *(WORDS[m] for m in columns), "seeds"), lines, words=len(keys))
    return found


def pictures(record: Record) -> dict[str, str]:
    """SVG files."""
    panels = {}
    for part, measure, title in (
        ("time", "time", "embryo time along the graph, rank r"),
        ("mixtures", "mixtures", "RNA shares, rank r"),
        ("proteins", "flattened", "neighbours by protein, rank r"),
        ("noise", "blob", "clusters in spike-in noise, beyond a normal's"),
    ):  # fmt: skip
        rows = record.only(part=part)
        if part in PICTURED:
            rows = rows.only(data=PICTURED[part])
        found = {m: list(rows.values(measure, method=m).values()) for m in METHODS}
        panels[title] = {m: values for m, values in found.items() if values}
    return {
        "evidence-learnt.svg": dots(
            {title: panel for title, panel in panels.items() if panel},
            "rank correlation, or difference of silhouettes",
            alt="What the latent keeps of time, mixtures and proteins, and makes of noise, a dot a seed",
            low=-0.2,
            high=1.0,
            zero=True,
        )
    }
