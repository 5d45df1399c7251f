"""Atlases of simulated cells with known truth, made block by block: any number of cells, little memory.

The simulator is not the decoder of any model here. For cell i of type t in batch b and gene g

.. code-block:: text

    rho_ig    = f_ig / sum_g f_ig,   log f_ig = base_g + tree_tg + sum_k a_ik P_kg
    cell_ig   ~ Poisson(Gamma(mean = depth_i capture_b size_t rho_ig effect_bg, shape = r_g))
    ambient_i ~ Multinomial(n_i, soup_b),   n_i ~ Poisson(lognormal)
    x_ig      = cell_ig + ambient_ig

where ``tree`` sums the sparse log-fold changes of the lineage and of the type and those of marker
genes, ``P`` are programmes that vary within types, ``effect`` is log-normal per gene and batch, and
``soup`` is what the batch's cells shed. A doublet is the sum of two cells of different types; a
near-empty droplet has ambient counts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
import pandas as pd
from atlasvi_kernels import CSR

from atlasvi.errors import OptionError

if TYPE_CHECKING:
    import anndata
    from numpy.typing import NDArray

BLOCK = 1_000
"""Cells that share a random stream. Part of the definition of an atlas: another value is another atlas."""

EMPTY = "empty"
"""The `cell_type` of a near-empty droplet."""

_MOST_SEEDS = (1 << 63) - 1
_MOST_COUNTS = 1_000_000
_PARAMETERS = (1 << 64) - 1  # the block number under which the genes' and types' parameters are drawn
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _Truth(NamedTuple):
    """What the compiled loops need to know of genes, types and batches."""

    type_rate: NDArray[np.float64]  # (T, G) exp(base + tree)
    gene_effect: NDArray[np.float64]  # (batches, G)
    shape: NDArray[np.float64]  # (G,) of the gamma
    soup: NDArray[np.float64]  # (batches, G) cumulative frequencies
    programme_start: NDArray[np.int64]  # (K + 1,)
    programme_gene: NDArray[np.int64]
    programme_loading: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Cells:
    """The draws of some cells but for their counts. Of a singlet, ``partner`` is -1."""

    cell_type: NDArray[np.int64]  # (n,)
    partner: NDArray[np.int64]  # (n,)
    batch: NDArray[np.int64]  # (n,)
    depth: NDArray[np.float64]  # (n, 2) expected counts of the cell and of its partner
    activity: NDArray[np.float64]  # (n, 2, K) of the programmes
    n_ambient: NDArray[np.int64]  # (n,)
    key: NDArray[np.uint64]  # (n, 2) of the counts' random stream

    def take(self, rows: NDArray[np.int64]) -> _Cells:
        return _Cells(*(getattr(self, name)[rows] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class _Batches:
    """What differs between batches besides the genes' effects."""

    share: NDArray[np.float64]  # (batches,) of the cells
    capture: NDArray[np.float64]  # (batches,)
    composition: NDArray[np.float64]  # (batches, T)


class Simulation:
    """A simulated atlas with known truth: a source that can be handed to `ingest` as it is.

    Cell ``i`` is the same whatever range or order it is read in, for a given seed and shape. Nothing
    is held but parameters, and, once asked for, the columns of obs.

    Args:
        n_obs: number of droplets, doublets and near-empty ones among them.
        n_vars: number of genes, at least 5 for each type.
        n_types: number of cell types, at least 2, hung in lineages of two or three.
        n_batches: number of batches, at least 1.
        doublet_rate: share of droplets with two cells of different types, in [0, 1).
        empty_rate: share of droplets without a cell, in [0, 1).
        counts_per_cell: median expected counts of a cell; by default 0.3 for each gene; at most a million.
        batch_effect: standard deviation of the log of a gene's effect in a batch, at most 2.
        ambient: median ambient counts of a droplet, as a share of ``counts_per_cell``.
        seed: of everything, in [0, 2^63).

    Raises:
        OptionError: an argument outside its range.

    Example:
        >>> simulation = Simulation(2_000, 500, seed=1)
        >>> simulation.read_rows(0, 10).shape
        (10, 500)
    """

    layer: str | None = None
    indptr: NDArray[np.int64] | None = None

    def __init__(
        self,
        n_obs: int = 50_000,
        n_vars: int = 2_000,
        *,
        n_types: int = 8,
        n_batches: int = 3,
        doublet_rate: float = 0.04,
        empty_rate: float = 0.02,
        counts_per_cell: float | None = None,
        batch_effect: float = 0.2,
        ambient: float = 0.04,
        seed: int = 0,
    ) -> None:
        for name, number in (("n_obs", n_obs), ("n_vars", n_vars), ("n_types", n_types),
                             ("n_batches", n_batches), ("seed", seed)):  # fmt: skip
            if not isinstance(number, int | np.integer):
                raise OptionError(f"{name} is {number!r} in Simulation; give a whole number")
        _check_within(n_obs=(n_obs, 1, None), n_types=(n_types, 2, None), n_batches=(n_batches, 1, None))
        _check_within(
            n_vars=(n_vars, 5 * n_types, None), seed=(seed, 0, _MOST_SEEDS), batch_effect=(batch_effect, 0, 2)
        )
        for name, rate in (("doublet_rate", doublet_rate), ("empty_rate", empty_rate), ("ambient", ambient)):
            if not 0 <= rate < 1:
                raise OptionError(f"{name} is {rate} in Simulation; give a number in [0, 1)")
        if counts_per_cell is not None and not 0 < counts_per_cell <= _MOST_COUNTS:
            raise OptionError(
                f"counts_per_cell is {counts_per_cell} in Simulation; give a number > 0, at most "
                f"{_MOST_COUNTS:,}"
            )
        self.n_obs, self.n_vars = int(n_obs), int(n_vars)
        self.n_types, self.n_batches, self.seed = n_types, n_batches, seed
        self._doublet_rate, self._empty_rate, self._ambient = doublet_rate, empty_rate, ambient
        self._counts_per_cell = 0.3 * n_vars if counts_per_cell is None else float(counts_per_cell)
        self._batch_effect = batch_effect

        rng = self._rng(_PARAMETERS)
        self._lineage = _lineages(n_types)
        self._marker_of = _marker_genes(rng, n_vars, n_types)
        log_rate = _expression_tree(rng, self._lineage, self._marker_of)
        self._type_share = _normalised(rng.gamma(6.0, size=n_types))
        self._type_size = np.exp(rng.normal(0.0, 0.2, n_types))
        self._batches = _draw_batches(rng, self._type_share, n_batches)
        self._truth = self._draw_truth(rng, log_rate)

    @property
    def name(self) -> str:
        """How a person would call it."""
        return f"simulation (seed {self.seed})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self.n_obs, self.n_vars

    @property
    def type_names(self) -> list[str]:
        """Names of the types: the letter of the lineage, then a number, such as ``B2``."""
        counts: dict[int, int] = {}
        names = []
        for lineage in self._lineage:
            counts[lineage] = counts.get(lineage, 0) + 1
            names.append(f"{_letter(lineage)}{counts[lineage]}")
        return names

    @property
    def batch_names(self) -> list[str]:
        """Names of the batches."""
        return [f"batch-{b + 1}" for b in range(self.n_batches)]

    @property
    def obs_names(self) -> NDArray[Any]:
        """``(n_obs,)`` names of the droplets."""
        blocks = [
            self.read_names(start, min(start + BLOCK, self.n_obs)) for start in range(0, self.n_obs, BLOCK)
        ]
        return np.concatenate(blocks)

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of the droplets ``start`` to ``stop``."""
        return np.array([f"cell-{i:07d}" for i in range(start, stop)], np.dtypes.StringDType())

    @cached_property
    def _var_names(self) -> NDArray[Any]:
        names, seen = [], [0] * self.n_types
        for gene, owner in enumerate(self._marker_of):
            if owner >= 0:
                seen[owner] += 1
                names.append(f"{self.type_names[owner]}-m{seen[owner]}")
            else:
                names.append(f"G{gene + 1:04d}")
        return np.array(names, np.dtypes.StringDType())

    @property
    def var_names(self) -> NDArray[Any]:
        """``(n_vars,)`` names of the genes: ``B2-m1`` is the first marker of type B2, others ``G0001``."""
        return self._var_names

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs.

        ``cell_type`` and ``coarse_type`` (of a doublet, those of its first cell; `EMPTY` without a
        cell), ``batch``, ``is_doublet``, ``is_empty``, ``true_depth`` (expected counts without ambient
        ones) and ``true_ambient`` (ambient counts).
        """
        return list(self._obs)

    def obs_column(self, key: str) -> pd.Categorical | NDArray[Any]:
        """One column of obs.

        Raises:
            OptionError: no such column.
        """
        if key not in self._obs:
            raise OptionError(f"column {key!r} is not in obs of {self.name}; it has {', '.join(self._obs)}")
        return self._obs[key]

    @property
    def var_keys(self) -> list[str]:
        """Columns of var: ``marker_of``, ``ambient_share`` (mean over batches) and ``dispersion`` (r_g)."""
        return ["marker_of", "ambient_share", "dispersion"]

    def var_column(self, key: str) -> pd.Categorical | NDArray[Any]:
        """One column of var.

        Raises:
            OptionError: no such column.
        """
        if key == "marker_of":
            codes = np.where(self._marker_of < 0, self.n_types, self._marker_of)
            return pd.Categorical.from_codes(codes, categories=[*self.type_names, "none"])
        if key == "ambient_share":
            return np.diff(self._truth.soup, prepend=0.0).mean(0).astype(np.float32)
        if key == "dispersion":
            return self._truth.shape.astype(np.float32)
        raise OptionError(f"column {key!r} is not in var of {self.name}; it has {', '.join(self.var_keys)}")

    def markers(self, n_each: int | None = None) -> NDArray[np.int64]:
        """Numbers of the marker genes, type by type: all, or at most ``n_each`` of each type."""
        return np.concatenate([np.flatnonzero(self._marker_of == t)[:n_each] for t in range(self.n_types)])

    def close(self) -> None:
        """Nothing is open."""

    def read_rows(self, start: int, stop: int) -> CSR:
        """Counts of the droplets ``start`` to ``stop``, at least one in each; from any thread.

        Raises:
            OptionError: a range outside the atlas.
        """
        self._check_range(start, stop)
        parts = [self._counts(cells) for cells in self._cells_of(np.arange(start, stop))]
        if not parts:
            empty = np.zeros(0, np.int32)
            return CSR.from_numpy(np.zeros(1, np.int64), empty.astype(self._index.dtype), empty, self.n_vars)
        return CSR.concatenate(parts)

    def true_rho(
        self, start: int, stop: int, *, genes: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """True expression frequencies of the droplets ``start`` to ``stop``; see `true_rho_of`."""
        self._check_range(start, stop)
        return self.true_rho_of(np.arange(start, stop), genes=genes)

    def true_rho_of(
        self, rows: NDArray[np.int64], *, genes: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """True expression frequencies, free of batch, ambient and depth.

        A doublet has the mean of its two cells, weighted by their depth; a near-empty droplet, in
        which no cell is, has what all types shed on average. Dense: ask for the cells you need.

        Args:
            rows: ``(n,)`` int64, numbers of the droplets, in any order.
            genes: ``(m,)`` int64, numbers of the genes; by default all. The frequencies are over all
                genes in either case.

        Returns:
            ``(n, m)`` float32.

        Raises:
            OptionError: a row outside the atlas.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_obs:
            raise OptionError(f"rows {rows.min()} to {rows.max()} asked of {self.n_obs} simulated droplets")
        columns = np.arange(self.n_vars) if genes is None else np.asarray(genes, np.int64)
        out = np.empty((len(rows), len(columns)), np.float32)
        order = np.argsort(rows, kind="stable")
        shed = self._shed().mean(0)
        done = 0
        for cells in self._cells_of(rows[order]):
            rho = _true_frequencies(
                self._truth, cells.cell_type, cells.partner, cells.depth, cells.activity, shed
            )
            out[order[done : done + len(rho)]] = rho[:, columns]
            done += len(rho)
        return out

    def to_anndata(self, rows: NDArray[np.int64] | None = None) -> anndata.AnnData:
        """The atlas, or some of its droplets, as an AnnData in memory."""
        import anndata

        rows = np.arange(self.n_obs) if rows is None else np.asarray(rows)
        if rows.dtype.kind not in "biu" and len(rows):
            raise OptionError(f"rows must be positions or a mask, are {rows.dtype}, in Simulation.to_anndata")
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        parts = [self.read_rows(int(row), int(row) + 1) for row in rows] if len(rows) < BLOCK else None
        counts = (
            CSR.concatenate(parts) if parts else self.read_rows(0, self.n_obs).take_rows(rows)
        ).to_scipy()
        obs = pd.DataFrame({key: self.obs_column(key) for key in self.obs_keys})
        obs.index = pd.Index(self.obs_names.astype(object))
        var = pd.DataFrame({key: self.var_column(key) for key in self.var_keys})
        var.index = pd.Index(self.var_names.astype(object))
        return anndata.AnnData(counts.astype(np.float32), obs=obs.iloc[rows], var=var)

    @property
    def _index(self) -> NDArray[Any]:
        """An array of the data type of gene numbers."""
        return np.empty(0, np.uint16 if self.n_vars <= 1 << 16 else np.int32)

    def _rng(self, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, block], np.uint64)))

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_obs:
            raise OptionError(f"rows {start} to {stop} asked of {self.n_obs} simulated droplets")

    def _counts(self, cells: _Cells) -> CSR:
        of_cells = [getattr(cells, name) for name in cells.__slots__]
        arrays: tuple[NDArray[Any], ...] = _draw_counts(self._truth, self._index, *of_cells)
        return CSR.from_numpy(arrays[0], arrays[1], arrays[2], self.n_vars)

    def _draw_truth(self, rng: np.random.Generator, log_rate: NDArray[np.float64]) -> _Truth:
        n_vars = self.n_vars
        start, gene, loading = _draw_programmes(rng, n_vars, max(self._lineage) + 1)
        truth = _Truth(
            type_rate=np.exp(log_rate),
            gene_effect=np.exp(rng.normal(0.0, self._batch_effect, (self.n_batches, n_vars))),
            shape=np.maximum(0.5, np.exp(rng.normal(np.log(4.0), 0.6, n_vars))),
            soup=np.empty((self.n_batches, n_vars)),
            programme_start=start,
            programme_gene=gene,
            programme_loading=loading,
        )
        # Fragile types shed more than their share, so the soup is not the mean cell.
        self._fragility = rng.gamma(2.0, size=self.n_types)
        shed = _normalised(self._shed(truth.type_rate) * truth.gene_effect)
        np.cumsum(shed, axis=1, out=truth.soup)
        truth.soup[:, -1] = 1.0
        return truth

    def _shed(self, type_rate: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """``(batches, G)`` frequencies of what the cells of each batch shed, free of batch effects."""
        rho = _normalised(self._truth.type_rate if type_rate is None else type_rate)
        return _normalised((self._batches.composition * self._type_size * self._fragility) @ rho)

    def _cells_of(self, rows: NDArray[np.int64]) -> Iterator[_Cells]:
        """The draws of sorted ``rows``, block after block."""
        for block in np.unique(rows // BLOCK):
            within = rows[rows // BLOCK == block] - block * BLOCK
            yield self._draw_cells(int(block)).take(within)

    def _draw_cells(self, block: int) -> _Cells:
        """All cells of a block, those beyond the end of the atlas too: so they do not depend on it."""
        rng = self._rng(block)
        batch = rng.choice(self.n_batches, BLOCK, p=self._batches.share)
        kind = rng.random(BLOCK)
        is_empty = kind < self._empty_rate
        is_doublet = ~is_empty & (kind < self._empty_rate + self._doublet_rate * (1 - self._empty_rate))
        composition = self._batches.composition.cumsum(1)
        cell_type = (rng.random(BLOCK)[:, None] > composition[batch]).sum(1).clip(max=self.n_types - 1)
        step = 1 + (rng.random(BLOCK) * (self.n_types - 1)).astype(np.int64)
        partner = np.where(is_doublet, (cell_type + step) % self.n_types, -1)
        types = np.stack([np.where(is_empty, -1, cell_type), partner], 1)

        depth = self._counts_per_cell * np.exp(rng.normal(0.0, 0.35, (BLOCK, 2)))
        depth *= self._type_size[types] * self._batches.capture[batch][:, None] * (types >= 0)
        ambient = self._ambient * self._counts_per_cell * np.exp(rng.normal(0.0, 0.4, BLOCK))
        # One count at least: a droplet without any is not seen, and cannot be normalised.
        n_ambient = np.maximum(rng.poisson(ambient), 1)
        key = rng.integers(0, 1 << 64, (BLOCK, 2), dtype=np.uint64)
        activity = _draw_activity(rng, np.asarray(self._lineage)[types], max(self._lineage) + 1)
        return _Cells(types[:, 0], partner, batch, depth, activity, n_ambient, key)

    @cached_property
    def _obs(self) -> dict[str, pd.Categorical | NDArray[Any]]:
        n_blocks = -(-self.n_obs // BLOCK)
        kinds, batch = np.empty(self.n_obs, np.int16), np.empty(self.n_obs, np.int16)
        is_doublet = np.empty(self.n_obs, bool)
        depth, ambient = np.empty(self.n_obs, np.float32), np.empty(self.n_obs, np.int32)
        for block in range(n_blocks):
            cells = self._draw_cells(block)
            at = slice(block * BLOCK, min(self.n_obs, (block + 1) * BLOCK))
            n = at.stop - at.start
            kinds[at], batch[at] = cells.cell_type[:n], cells.batch[:n]
            is_doublet[at] = cells.partner[:n] >= 0
            depth[at], ambient[at] = cells.depth[:n].sum(1), cells.n_ambient[:n]
        is_empty = kinds < 0
        n_lineages = max(self._lineage) + 1
        lineage = np.where(is_empty, np.int16(n_lineages), np.asarray(self._lineage, np.int16)[kinds])
        types = np.where(is_empty, np.int16(self.n_types), kinds)
        coarse_names = [_letter(i) for i in range(n_lineages)]
        return {
            "cell_type": _categorical(types, self.type_names, bool(self._empty_rate)),
            "coarse_type": _categorical(lineage, coarse_names, bool(self._empty_rate)),
            "batch": pd.Categorical.from_codes(batch, categories=self.batch_names),
            "is_doublet": is_doublet,
            "is_empty": is_empty,
            "true_depth": depth,
            "true_ambient": ambient,
        }


def _check_within(**values: tuple[float, float, float | None]) -> None:
    for name, (value, least, most) in values.items():
        if not value >= least or (most is not None and value > most):
            at_most = "" if most is None else f" and <= {most}"
            raise OptionError(f"{name} is {value} in Simulation; give a number >= {least}{at_most}")


def _normalised(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rates / rates.sum(-1, keepdims=True))


def _letter(lineage: int) -> str:
    return _LETTERS[lineage] if lineage < len(_LETTERS) else f"L{lineage + 1}-"


def _categorical(codes: NDArray[Any], names: list[str], with_empty: bool) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, categories=[*names, EMPTY] if with_empty else names)


def _lineages(n_types: int) -> list[int]:
    """The lineage of each type: as few lineages as hold three types each."""
    n_lineages = -(-n_types // 3)
    return sorted(t % n_lineages for t in range(n_types))


def _marker_genes(rng: np.random.Generator, n_vars: int, n_types: int) -> NDArray[np.int64]:
    """``(G,)`` the type each gene marks, or -1."""
    n_each = min(8, n_vars // (5 * n_types))
    out = np.full(n_vars, -1)
    out[rng.permutation(n_vars)[: n_each * n_types]] = np.repeat(np.arange(n_types), n_each)
    return out


def _expression_tree(
    rng: np.random.Generator, lineage: list[int], marker_of: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``(T, G)`` log rates: a base, the sparse changes of the lineage and of the type, the markers."""
    n_types, n_vars = len(lineage), len(marker_of)
    base = rng.normal(0.0, 1.35, n_vars).clip(-3.5, 3.5)
    of_lineage = _sparse_normal(rng, (max(lineage) + 1, n_vars), share=0.10, scale=0.9)
    of_type = _sparse_normal(rng, (n_types, n_vars), share=0.05, scale=0.7)
    log_rate = base + of_lineage[lineage] + of_type
    markers = np.flatnonzero(marker_of >= 0)
    log_rate[:, markers] = rng.normal(-1.0, 0.5, len(markers))
    log_rate[marker_of[markers], markers] += rng.uniform(1.8, 3.2, len(markers))
    # Markers are faint in the sister types too, as they are in tissue.
    sisters = np.asarray(lineage)[:, None] == np.asarray(lineage)[marker_of[markers]]
    sisters[marker_of[markers], np.arange(len(markers))] = False
    log_rate[:, markers] += sisters * rng.uniform(0.0, 1.0, len(markers))
    return log_rate


def _sparse_normal(
    rng: np.random.Generator, shape: tuple[int, int], *, share: float, scale: float
) -> NDArray[np.float64]:
    return rng.normal(0.0, scale, shape) * (rng.random(shape) < share)


def _draw_batches(rng: np.random.Generator, type_share: NDArray[np.float64], n_batches: int) -> _Batches:
    tilt = np.exp(rng.normal(0.0, 0.2, (n_batches, len(type_share))))
    return _Batches(
        share=_normalised(rng.gamma(20.0, size=n_batches)),
        capture=np.exp(rng.normal(0.0, 0.25, n_batches)),
        composition=_normalised(type_share * tilt),
    )


def _draw_programmes(
    rng: np.random.Generator, n_vars: int, n_lineages: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Sparse loadings: one programme of dividing cells, one of stress, then one for each lineage."""
    n_programmes, n_each = 2 + n_lineages, max(1, n_vars // 20)
    genes = np.concatenate([rng.permutation(n_vars)[:n_each] for _ in range(n_programmes)])
    start = np.arange(n_programmes + 1) * n_each
    return start, genes.astype(np.int64), rng.normal(0.2, 0.8, len(genes)).clip(-1.6, 1.6)


def _draw_activity(
    rng: np.random.Generator, lineage: NDArray[np.int64], n_lineages: int
) -> NDArray[np.float64]:
    """``(n, 2, K)`` activities: a sixth of the cells divides, all are stressed a little, all mature."""
    shape = lineage.shape
    dividing = (rng.random(shape) < 1 / 6) * rng.uniform(0.4, 1.2, shape)
    stressed = rng.beta(1.0, 3.0, shape) * 1.2
    maturity = rng.beta(1.2, 1.2, shape) * 1.4
    own = lineage[..., None] == np.arange(n_lineages)
    return np.concatenate([dividing[..., None], stressed[..., None], maturity[..., None] * own], -1)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _uniform(key, counter):  # type: ignore[no-untyped-def]
    """SplitMix64 (Steele et al. 2014): the draw is a function of key and counter alone."""
    z = key + (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _gamma_poisson(mu, shape, u):  # type: ignore[no-untyped-def]
    """The u-quantile of a Poisson whose mean is gamma distributed, by summing its probabilities."""
    p = np.exp(-shape * np.log1p(mu / shape))
    odds = mu / (mu + shape)
    cumulative, k = p, 0
    while u >= cumulative and not (p < 1e-20 and k > mu):
        p *= odds * (k + shape) / (k + 1)
        cumulative += p
        k += 1
    return k


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fill_frequencies(truth, cell_type, activity, out):  # type: ignore[no-untyped-def]
    for g in range(len(out)):
        out[g] = truth.type_rate[cell_type, g]
    for k in range(len(activity)):
        if activity[k] != 0:
            for j in range(truth.programme_start[k], truth.programme_start[k + 1]):
                out[truth.programme_gene[j]] *= np.exp(activity[k] * truth.programme_loading[j])
    total = 0.0
    for g in range(len(out)):
        total += out[g]
    for g in range(len(out)):
        out[g] /= total


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add_cell(truth, cell_type, batch, depth, activity, key, mu, u, counts):  # type: ignore[no-untyped-def]
    _fill_frequencies(truth, cell_type, activity, mu)
    # Loops without a branch, which the compiler can vectorise, then one with.
    for g in range(len(mu)):
        mu[g] *= depth * truth.gene_effect[batch, g]
    for g in range(len(u)):
        u[g] = _uniform(key, g)
    for g in range(len(counts)):
        # P(0) >= exp(-mu) >= 1 - mu, so most genes are known to be zero without an exponential.
        if u[g] >= 1.0 - mu[g]:
            counts[g] += _gamma_poisson(mu[g], truth.shape[g], u[g])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _draw_counts(truth, index, cell_type, partner, batch, depth, activity, n_ambient, key):  # type: ignore[no-untyped-def]
    n_vars = truth.type_rate.shape[1]
    mu, u, counts = np.empty(n_vars), np.empty(n_vars), np.zeros(n_vars, np.int32)
    indptr = np.zeros(len(cell_type) + 1, np.int64)
    capacity = 512 * len(cell_type) + n_vars
    indices, data = np.empty(capacity, index.dtype), np.empty(capacity, np.int32)
    n = 0
    for i in range(len(cell_type)):
        counts[:] = 0
        if cell_type[i] >= 0:
            _add_cell(truth, cell_type[i], batch[i], depth[i, 0], activity[i, 0], key[i, 0], mu, u, counts)
        if partner[i] >= 0:
            _add_cell(truth, partner[i], batch[i], depth[i, 1], activity[i, 1], key[i, 1], mu, u, counts)
        for j in range(n_ambient[i]):
            counts[np.searchsorted(truth.soup[batch[i]], _uniform(key[i, 0], n_vars + j), side="right")] += 1
        if n + n_vars >= capacity:
            capacity = 2 * capacity + n_vars
            indices = np.concatenate((indices[:n], np.empty(capacity - n, index.dtype)))
            data = np.concatenate((data[:n], np.empty(capacity - n, np.int32)))
        for g in range(n_vars):
            # Written always and kept if not zero: no branch to mispredict.
            indices[n], data[n] = g, counts[g]
            n += counts[g] != 0
        indptr[i + 1] = n
    return indptr, indices[:n].copy(), data[:n].copy()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _true_frequencies(truth, cell_type, partner, depth, activity, shed):  # type: ignore[no-untyped-def]
    n_vars = truth.type_rate.shape[1]
    out = np.empty((len(cell_type), n_vars), np.float32)
    rho = np.empty(n_vars)
    for i in range(len(cell_type)):
        if cell_type[i] < 0:
            out[i] = shed
            continue
        _fill_frequencies(truth, cell_type[i], activity[i, 0], rho)
        out[i] = rho
        if partner[i] >= 0:
            weight = depth[i, 1] / (depth[i, 0] + depth[i, 1])
            _fill_frequencies(truth, partner[i], activity[i, 1], rho)
            for g in range(n_vars):
                out[i, g] += weight * (rho[g] - out[i, g])
    return out
