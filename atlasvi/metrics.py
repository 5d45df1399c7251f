"""What a latent is worth: clusters against known types, mixing of batches, decoded against true expression.

Everything here is measured on the latent itself, never on a 2-D picture of it. Where a measure would
not scale it is taken on a seeded subsample, and the result says of how many cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.stats

from atlasvi.errors import CellsError, ObsError, OptionError

if TYPE_CHECKING:
    from atlasvi_kernels import CSR
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ClusteringScores:
    """Agreement of k-means clusters with labels.

    Args:
        ari: adjusted Rand index, 1 if the same, 0 on average by chance.
        nmi: normalised mutual information (geometric mean of the entropies), in [0, 1].
        n_clusters: of k-means.
        n_used: number of cells clustered.
    """

    ari: float
    nmi: float
    n_clusters: int
    n_used: int


@dataclass(frozen=True, slots=True)
class MixingScore:
    """Entropy of batch mixing.

    Args:
        entropy: in nats, mean over the repeats.
        spread: standard deviation over the repeats.
        ceiling: entropy of the batches' frequencies in all cells, which perfect mixing reaches.
        n_neighbors: number of nearest neighbours looked at.
        n_used: number of cells among which they were sought.
    """

    entropy: float
    spread: float
    ceiling: float
    n_neighbors: int
    n_used: int


@dataclass(frozen=True, slots=True)
class LatentScores:
    """All scores of one latent.

    Args:
        name: of the method, as a person would read it.
        clustering: agreement of clusters with the types.
        mixing: of the batches.
        silhouette: mean silhouette width of the types, in [-1, 1].
        n_silhouette: number of cells it was taken on.
    """

    name: str
    clustering: ClusteringScores
    mixing: MixingScore
    silhouette: float
    n_silhouette: int


@dataclass(frozen=True, slots=True)
class PCALatent:
    """Principal components of log-normalised counts.

    Args:
        latent: ``(n, k)`` float32, the cells' coordinates.
        components: ``(k, G)`` float64, orthonormal rows.
        mean: ``(G,)`` float64, of the log-normalised counts.
        explained_variance: ``(k,)`` float64, in falling order.
        target_sum: the total that every cell was scaled to.
    """

    latent: NDArray[np.float32]
    components: NDArray[np.float64]
    mean: NDArray[np.float64]
    explained_variance: NDArray[np.float64]
    target_sum: float


@dataclass(frozen=True, slots=True)
class DecodeCheck:
    """Decoded expression frequencies beside the true ones.

    Args:
        pearson_log: Pearson correlation of the logs, over all entries (cells x genes).
        spearman_per_gene: ``(G,)`` Spearman correlation over the types' means, gene by gene; NaN where
            a gene has the same mean in all types.
        median_log_ratio: median of |log2(decoded / true)| over all entries.
        types: names of the types, in the order of the means' rows.
        decoded_mean: ``(T, G)`` mean over the cells of each type.
        true_mean: ``(T, G)``.
        n_cells: number of cells compared.
    """

    pearson_log: float
    spearman_per_gene: NDArray[np.float64]
    median_log_ratio: float
    types: tuple[str, ...]
    decoded_mean: NDArray[np.float64]
    true_mean: NDArray[np.float64]
    n_cells: int

    @property
    def spearman_median(self) -> float:
        """Median over the genes that have a correlation."""
        return float(np.nanmedian(self.spearman_per_gene))


def subsample(n: int, max_cells: int, *, seed: int) -> NDArray[np.int64]:
    """Sorted numbers of at most ``max_cells`` of ``n`` cells, drawn without replacement."""
    if n <= max_cells:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, max_cells, replace=False))


def clustering_scores(
    latent: NDArray[Any],
    labels: Any,
    *,
    seed: int,
    n_clusters: int | None = None,
    n_init: int = 20,
    max_cells: int = 20_000,
) -> ClusteringScores:
    """ARI and NMI of k-means clusters of the latent with the labels, as in Lopez et al. (2018).

    Args:
        latent: ``(n, k)``.
        labels: ``(n,)`` types; a categorical's unused levels do not count.
        seed: of the subsample and of k-means.
        n_clusters: by default as many as there are types.
        n_init: starts of k-means, of which the best is kept.
        max_cells: above this many, a subsample is clustered.

    Raises:
        CellsError: latent and labels of different length.
        ObsError: labels with gaps.

    Example:
        >>> import numpy as np
        >>> latent = np.repeat(np.eye(2), 20, axis=0)
        >>> clustering_scores(latent, ["a"] * 20 + ["b"] * 20, seed=0).ari
        1.0
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    codes, rows = _aligned(latent, labels, "labels", max_cells, seed)
    n_clusters = len(np.unique(codes)) if n_clusters is None else n_clusters
    if not 1 <= n_clusters <= len(rows):
        raise OptionError(f"n_clusters is {n_clusters} for {len(rows)} cells; give 1 to {len(rows)}")
    found = KMeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(np.asarray(latent)[rows])
    return ClusteringScores(
        ari=float(adjusted_rand_score(codes, found)),
        nmi=float(normalized_mutual_info_score(codes, found, average_method="geometric")),
        n_clusters=n_clusters,
        n_used=len(rows),
    )


def entropy_of_batch_mixing(
    latent: NDArray[Any],
    batch: Any,
    *,
    seed: int,
    n_neighbors: int = 50,
    n_cells: int = 100,
    n_repeats: int = 50,
    max_cells: int = 100_000,
) -> MixingScore:
    """Entropy of the batches among the nearest neighbours of random cells (Haghverdi et al. 2018).

    As Lopez et al. (2018) measure it: ``n_cells`` cells are drawn, the entropy of the batches'
    frequencies among the ``n_neighbors`` nearest other cells of each is averaged, and that is repeated
    and averaged. Batches that differ in their types cannot reach the ceiling.

    Args:
        latent: ``(n, k)``.
        batch: ``(n,)`` levels.
        seed: of the subsample and of the draws.
        n_neighbors: at most the number of cells less one.
        n_cells: drawn in each repeat.
        n_repeats: how often.
        max_cells: above this many, neighbours are sought in a subsample.

    Raises:
        CellsError: latent and batch of different length.
        ObsError: batch with gaps.
        OptionError: fewer cells than neighbours.

    Example:
        >>> import numpy as np
        >>> latent = np.random.default_rng(0).normal(size=(200, 2))
        >>> entropy_of_batch_mixing(latent, ["only"] * 200, seed=0).entropy
        0.0
    """
    from sklearn.neighbors import NearestNeighbors

    codes, rows = _aligned(latent, batch, "batch", max_cells, seed)
    n = len(rows)
    if not 1 <= n_neighbors < n:
        raise OptionError(f"n_neighbors is {n_neighbors} for {n} cells; give 1 to {n - 1}")
    points = np.asarray(latent)[rows]
    drawn = np.random.default_rng(seed).integers(0, n, (n_repeats, n_cells))
    # Each cell once, though several repeats may draw it.
    asked, where = np.unique(drawn, return_inverse=True)
    found = (
        NearestNeighbors(n_neighbors=n_neighbors + 1)
        .fit(points)
        .kneighbors(points[asked], return_distance=False)
    )
    # A cell is its own nearest neighbour, unless others lie on it; then the last goes.
    other = found != asked[:, None]
    other[other.all(1), -1] = False
    neighbors = found[other].reshape(len(asked), n_neighbors)
    n_batches = codes.max() + 1
    counts = np.zeros((len(asked), n_batches))
    np.add.at(counts, (np.arange(len(asked))[:, None], codes[neighbors]), 1)
    entropy = scipy.stats.entropy(counts, axis=1)[where.reshape(drawn.shape)].mean(1)
    return MixingScore(
        entropy=float(entropy.mean()),
        spread=float(entropy.std()),
        ceiling=float(scipy.stats.entropy(np.bincount(codes))),
        n_neighbors=n_neighbors,
        n_used=n,
    )


def silhouette(latent: NDArray[Any], labels: Any, *, seed: int, max_cells: int = 5_000) -> tuple[float, int]:
    """Mean silhouette width of the labels in the latent (Rousseeuw 1987), and of how many cells.

    Raises:
        CellsError: latent and labels of different length.
        ObsError: labels with gaps, of one level alone, or with one for each cell.
    """
    from sklearn.metrics import silhouette_score

    codes, rows = _aligned(latent, labels, "labels", max_cells, seed)
    n_levels = len(np.unique(codes))
    if not 1 < n_levels < len(rows):
        raise ObsError(
            f"labels has {n_levels} level{'s' * (n_levels != 1)} among {len(rows)} cells looked at; a "
            "silhouette compares 2 at least, and some cells must share one"
        )
    return float(silhouette_score(np.asarray(latent)[rows], codes)), len(rows)


def score_latent(
    name: str,
    latent: NDArray[Any],
    labels: Any,
    batch: Any,
    *,
    seed: int,
    n_clusters: int | None = None,
    keep: NDArray[np.bool_] | None = None,
) -> LatentScores:
    """All scores of a latent.

    Args:
        name: of the method.
        latent: ``(n, k)``.
        labels: ``(n,)`` types.
        batch: ``(n,)`` batches.
        seed: of every subsample and draw.
        n_clusters: of k-means; by default the number of types.
        keep: ``(n,)`` the cells to score, for example without doublets and empty droplets.

    Raises:
        CellsError: lengths that differ.
        ObsError: labels or batches with gaps.
    """
    latent, labels, batch = np.asarray(latent), pd.Categorical(labels), pd.Categorical(batch)
    if keep is not None:
        latent, labels, batch = latent[keep], labels[keep], batch[keep]
    width, n_silhouette = silhouette(latent, labels, seed=seed)
    return LatentScores(
        name=name,
        clustering=clustering_scores(latent, labels, seed=seed, n_clusters=n_clusters),
        mixing=entropy_of_batch_mixing(latent, batch, seed=seed),
        silhouette=width,
        n_silhouette=n_silhouette,
    )


def pca_latent(
    blocks: Callable[[], Iterable[CSR]],
    *,
    n_components: int = 10,
    seed: int,
    target_sum: float | None = None,
    n_iter: int = 5,
    n_oversamples: int = 10,
) -> PCALatent:
    """Principal components of log1p(x / total * target_sum), by streamed subspace iteration.

    The randomised method of Halko et al. (2011) on the covariance: each pass multiplies it by a thin
    matrix, block by block, and never forms it, so memory is that of a block and of a few vectors as
    long as the genes. The baseline that a model has to beat.

    Args:
        blocks: called anew for each of the ``n_iter + 3`` passes; yields the cells in the same order.
        n_components: at most the number of genes.
        seed: of the start.
        target_sum: total that cells are scaled to; by default the median total, as scanpy does.
        n_iter: of the subspace iteration.
        n_oversamples: further vectors carried along, which speed up convergence.

    Raises:
        CellsError: no cells.
        OptionError: more components than genes.

    Example:
        >>> import scipy.sparse as sp
        >>> from atlasvi_kernels import CSR
        >>> counts = CSR.from_scipy(sp.random(60, 20, 0.5, format="csr", rng=0))
        >>> pca_latent(lambda: [counts], n_components=3, seed=0).latent.shape
        (60, 3)
    """
    totals, n_vars = _totals(blocks)
    if not 1 <= n_components <= n_vars:
        raise OptionError(f"n_components is {n_components} for {n_vars} genes; give 1 to {n_vars}")
    target = float(np.median(totals[totals > 0])) if target_sum is None else float(target_sum)

    def rows() -> Iterable[Any]:
        return (_log_normalised(block, target) for block in blocks())

    n = len(totals)
    mean = np.zeros(n_vars)
    for block in rows():
        mean += np.asarray(block.sum(0), np.float64).ravel() / n
    width = min(n_vars, n_components + n_oversamples)
    basis: NDArray[np.float64]
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n_vars, width)))[0]
    for _ in range(n_iter):
        basis = np.linalg.qr(_times_covariance(rows(), basis, mean))[0]
    # Rayleigh-Ritz in the last basis, with the covariance of the coordinates.
    coordinates = np.concatenate([block @ basis for block in rows()]) - mean @ basis
    variance, rotation = scipy.linalg.eigh(coordinates.T @ coordinates / max(1, n - 1))
    order = np.argsort(variance)[::-1][:n_components]
    components = (basis @ rotation[:, order]).T
    # The sign is free; the largest loading is made positive so that runs agree.
    sign = np.sign(components[np.arange(n_components), np.abs(components).argmax(1)])
    return PCALatent(
        latent=(coordinates @ rotation[:, order] * sign).astype(np.float32),
        components=components * sign[:, None],
        mean=mean,
        explained_variance=variance[order].clip(min=0.0),
        target_sum=target,
    )


def decode_check(
    decoded: NDArray[Any], true: NDArray[Any], labels: Any, *, floor: float = 1e-9
) -> DecodeCheck:
    """Compare decoded with true expression frequencies of the same cells and genes.

    Args:
        decoded: ``(n, G)`` frequencies; a bounded number of cells and genes.
        true: ``(n, G)``.
        labels: ``(n,)`` types.
        floor: frequencies below it count as this, before logs are taken.

    Raises:
        CellsError: shapes that differ.
        ObsError: labels with gaps.
    """
    decoded, true = np.asarray(decoded, np.float64), np.asarray(true, np.float64)
    if decoded.shape != true.shape or decoded.ndim != 2:
        raise CellsError(
            f"decoded is {decoded.shape} and true {true.shape}; both must be (cells, genes) of the same cells"
        )
    _aligned(decoded, labels, "labels", len(decoded), 0)
    labels = pd.Categorical(labels).remove_unused_categories()
    logs = [np.log2(np.maximum(values, floor)) for values in (decoded, true)]
    means = [_group_means(values, labels) for values in (decoded, true)]
    return DecodeCheck(
        pearson_log=float(np.corrcoef(logs[0].ravel(), logs[1].ravel())[0, 1]),
        spearman_per_gene=_rank_correlation(*means),
        median_log_ratio=float(np.median(np.abs(logs[0] - logs[1]))),
        types=tuple(str(level) for level in labels.categories),
        decoded_mean=means[0],
        true_mean=means[1],
        n_cells=len(decoded),
    )


def _aligned(
    latent: NDArray[Any], labels: Any, what: str, max_cells: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes of the labels of the subsample, and the subsample."""
    if len(latent) != len(labels):
        raise CellsError(f"{what} has {len(labels)} entries for {len(latent)} cells; give one for each cell")
    codes = pd.Categorical(labels).codes.astype(np.int64)
    if len(codes) and codes.min() < 0:
        raise ObsError(f"{what} has no value at cell {int(codes.argmin())}; leave such cells out")
    rows = subsample(len(codes), max_cells, seed=seed)
    return np.unique(codes[rows], return_inverse=True)[1], rows


def _totals(blocks: Callable[[], Iterable[CSR]]) -> tuple[NDArray[np.float64], int]:
    totals, n_vars = [np.empty(0)], 0
    for block in blocks():
        totals.append(block.row_sums().double().numpy())
        n_vars = block.n_vars
    if not any(len(part) for part in totals):
        raise CellsError("no cells to take principal components of; is the selection empty?")
    return np.concatenate(totals), n_vars


def _log_normalised(block: CSR, target_sum: float) -> Any:
    matrix = block.to_scipy().astype(np.float32)
    totals = np.asarray(matrix.sum(1)).ravel()
    scale = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)).astype(np.float32))
    return matrix


def _times_covariance(
    blocks: Iterable[Any], basis: NDArray[np.float64], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``(X - mean).T @ (X - mean) @ basis / n`` without making ``X - mean``, which is dense."""
    out, n = np.zeros_like(basis), 0
    narrow = basis.astype(np.float32)
    for block in blocks:
        out += block.T @ (block @ narrow)
        n += block.shape[0]
    return np.asarray(out / n - np.outer(mean, mean @ basis))


def _group_means(values: NDArray[np.float64], labels: pd.Categorical) -> NDArray[np.float64]:
    codes = labels.codes
    return np.stack([values[codes == group].mean(0) for group in range(len(labels.categories))])


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(G,)`` Spearman correlation of each column of ``a`` with that of ``b``."""
    ranks = [scipy.stats.rankdata(values, axis=0) for values in (a, b)]
    centred = [values - values.mean(0) for values in ranks]
    norm = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    out = np.full(norm.shape, np.nan)
    np.divide((centred[0] * centred[1]).sum(0), norm, out=out, where=norm > 0)
    return out
