"""What a matrix of counts with names must offer, wherever it lives."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlasvi_kernels import CSR

STRING = np.dtypes.StringDType()


@dataclass(frozen=True)
class Extras:
    """What a source holds besides counts, obs and var, so that ingest can carry it or name it.

    Args:
        obsm: arrays of one row a cell; each has ``shape``, ``dtype`` and slices by rows.
        obsm_frames: names of the tables (data frames) in obsm, read with `Source.obsm_frame`.
        uns: reads the unstructured part, or ``None`` where there is none.
        left_out: what cannot be carried, in words that a person understands.
        elsewhere: names of other matrices of the same cells: layers, ``"raw"``, ``"X"``.
    """

    obsm: dict[str, Any] = field(default_factory=dict)
    obsm_frames: tuple[str, ...] = ()
    uns: Callable[[], dict[str, Any]] | None = None
    left_out: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()


class Source(abc.ABC):
    """A matrix of counts (cells x genes) with names: the one interface of `ingest` and of `Atlas`.

    To feed anything else into `ingest` (a simulator that makes cells as it goes, a database), subclass
    this and write the abstract parts; the rest has defaults. Nothing is kept between calls by default:
    names and columns are read when asked for. All methods may be called from several threads.
    """

    layer: str | None = None
    path: Path | None = None
    is_checked: bool = False
    """Whether every entry is known to be a count, as where `ingest` made it; else it is checked as read."""
    is_shuffled: bool = False
    """Whether the cells are known to lie in a random order, as where `ingest` was told to shuffle them."""
    by_genes: bool = False
    """Whether the counts are stored by genes, and put into rows on disk before the first can be read."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """How a person would call it: a path, or ``AnnData``."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""

    @property
    @abc.abstractmethod
    def obs_names(self) -> NDArray[Any]:
        """``(n_obs,)`` names of the cells, of numpy's ``StringDType``."""

    @property
    @abc.abstractmethod
    def var_names(self) -> NDArray[Any]:
        """``(n_vars,)`` names of the genes, of numpy's ``StringDType``."""

    @abc.abstractmethod
    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop`` as they are stored: any type, columns in any order, none twice."""

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """``(n_obs + 1,)`` int64 offsets of the rows, or ``None`` where that is not known before reading."""
        return None

    @property
    def in_memory(self) -> bool:
        """Whether the counts are in the memory of this process already."""
        return False

    @property
    def place(self) -> str:
        """Where the counts are, as an error names it: ``X``, ``layers['counts']``, ``raw.X``."""
        return "X"

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of the cells ``start`` to ``stop``."""
        return self.obs_names[start:stop]

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs."""
        return []

    def obs_column(self, key: str) -> Any:
        """One column of obs: a ``pd.Categorical``, a numpy array or a nullable pandas array."""
        raise KeyError(key)

    @property
    def var_keys(self) -> list[str]:
        """Columns of var."""
        return []

    def var_column(self, key: str) -> Any:
        """One column of var."""
        raise KeyError(key)

    def extras(self) -> Extras:
        """What else there is."""
        return Extras()

    def obsm_frame(self, key: str) -> Any:
        """One table of obsm, as a ``pd.DataFrame``."""
        raise KeyError(key)

    def values(self, n: int) -> Iterator[NDArray[Any]]:
        """Some of the values, to see what kind they are: those of up to ``n`` cells from three places."""
        n_obs = self.shape[0]
        for start in sorted({0, max(0, (n_obs - n) // 2), max(0, n_obs - n)}):
            yield self.read_rows(start, min(n_obs, start + n)).numpy()[2]

    def other(self, layer: str | None) -> Source:
        """The same cells with the counts taken from somewhere else (one of ``extras().elsewhere``)."""
        raise KeyError(layer)

    def close(self) -> None:  # noqa: B027 - most sources have nothing to give back
        """Give back files and temporary space."""
