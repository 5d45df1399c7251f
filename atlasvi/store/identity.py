"""Whether two atlases hold the same cells: checksums of all counts, of a few dozen cells', of codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from atlasvi_kernels import CSR
from numpy.typing import NDArray

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

_PLACES, _CELLS_EACH = 8, 8
_CODES_AT_ONCE = 1 << 16


class Checksum:
    """SHA-256 of counts, the same in whatever types, chunks, format or order within a cell they are stored.

    Of the genes' names, and for each cell the number of genes that it has, these genes in order, and their
    counts, each as little-endian uint32. Explicit zeros do not count. What it was cut into does not matter.

    Args:
        var_names: of the genes, in the order of the columns.

    Example:
        >>> import scipy.sparse as sp
        >>> whole, parts = Checksum(["a", "b"]), Checksum(["a", "b"])
        >>> counts = CSR.from_scipy(sp.csr_matrix([[0, 2], [1, 0]]))
        >>> whole.add(counts)
        >>> parts.add(counts.row_range(0, 1))
        >>> parts.add(counts.row_range(1, 2))
        >>> whole.hexdigest() == parts.hexdigest()
        True
    """

    def __init__(self, var_names: Sequence[str]) -> None:
        self._names = hashlib.sha256(json.dumps(list(var_names)).encode()).digest()
        # Lengths of the rows, genes and counts apart, since a row may come in any block.
        self._of = [hashlib.sha256() for _ in range(3)]
        self._n_obs = 0

    def add(self, counts: CSR) -> None:
        """Add the next cells."""
        matrix = counts.drop_zeros().to_scipy()
        matrix.sort_indices()
        columns: tuple[NDArray[Any], ...] = (np.diff(matrix.indptr), matrix.indices, matrix.data)
        for checksum, values in zip(self._of, columns, strict=True):
            checksum.update(np.ascontiguousarray(values, "<u4"))
        self._n_obs += counts.n_obs

    def hexdigest(self) -> str:
        """Of all cells so far."""
        whole = hashlib.sha256(f"atlasvi counts 1, {self._n_obs} cells".encode())
        for part in (self._names, *(checksum.digest() for checksum in self._of)):
            whole.update(part)
        return whole.hexdigest()


def look(atlas: Atlas) -> str:
    """A checksum of an atlas's size, genes and up to 64 of its cells, from eight places: it reads no more.

    By it an atlas is known again, and two that differ in cells, their order or genes are told apart; one that
    was changed elsewhere is not.
    """
    checksum = Checksum([str(name) for name in atlas.var_names])
    starts = np.unique(np.linspace(0, max(atlas.n_obs - _CELLS_EACH, 0), _PLACES).astype(np.int64))
    for start in starts.tolist():
        checksum.add(atlas.read_rows(slice(start, min(start + _CELLS_EACH, atlas.n_obs))))
    return hashlib.sha256(f"{atlas.n_obs} {checksum.hexdigest()}".encode()).hexdigest()


def look_at_codes(codes: Codes) -> str:
    """A checksum of what is known of all cells: batches, labels, covariates, size factors."""
    whole = hashlib.sha256()
    for values in (codes.batch_index, codes.labels, codes.cat_covs, codes.cont_covs, codes.size_factor):
        if values is None:
            continue
        whole.update(f"{values.shape}".encode())
        for start in range(0, len(values), _CODES_AT_ONCE):
            part = values[start : start + _CODES_AT_ONCE]
            whole.update(np.ascontiguousarray(part, "<f4" if part.dtype.kind == "f" else "<i8"))
    return whole.hexdigest()


__all__ = ["Checksum", "look", "look_at_codes"]
