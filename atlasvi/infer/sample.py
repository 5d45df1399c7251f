"""Counts that the model would see: of the cells again, of unseen cells, and what they are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from atlasvi_kernels import CSR, counter_counts, counter_uniform
from numpy.typing import NDArray

from atlasvi.errors import ModelError, OptionError
from atlasvi.infer.decode import Request, in_batch, lazy, piece_rows, rows_of_chunks
from atlasvi.infer.encoded import Encoded, EncodedBlock, Key, Source
from atlasvi.infer.normalized import LARGEST_DENSE, refuse_large
from atlasvi.store import base as store
from atlasvi.types import CountParameters, FieldMap, GeneratesCounts, InfersLibrary, Noise

if TYPE_CHECKING:
    import dask.array as da
    import scipy.sparse as sp

# Cells drawn at once: their parameters and counts are dense.
_PIECE_BYTES = 8 << 20
# Noise stream of the choice of a template or a neighbour for each new cell.
_CHOICE = 3


def generates(module: torch.nn.Module) -> Any:
    """The module, if it has a count distribution.

    Raises:
        ModelError: it has none.
    """
    if not isinstance(module, GeneratesCounts):
        raise ModelError(
            f"{type(module).__name__} has no distribution of counts: nothing can be drawn from it"
        )
    return module


@torch.no_grad()
def parameters(
    module: Any, block: EncodedBlock, request: Request, sample: int, code: int | None
) -> CountParameters:
    """The count distribution of some cells at one draw of z (and l, where it is latent).

    Args:
        module: satisfies `types.GeneratesCounts`.
        block: of cells.
        request: genes, library size and seed.
        sample: number of the draw.
        code: of the batch to decode under, or ``None`` for each cell's own.
    """
    size = request.library_size
    library = (
        block.draw_library(request.seed, sample) if size is None else torch.full_like(block.library, size)
    )
    z = block.draw(request.seed, sample)
    found: CountParameters = module.count_parameters(z, library, in_batch(block.cells, code), request.genes)
    return found


def draw_counts(
    module: Any, block: EncodedBlock, request: Request, sample: int, code: int | None
) -> NDArray[np.int32]:
    """``(B, k)`` counts from p(x | z, l), by (seed, sample, cell, gene) alone; arguments as `parameters`."""
    found = parameters(module, block, request, sample, code)
    genes = torch.arange(found.mu.shape[1]) if request.genes is None else request.genes
    rows = block.cells.rows
    return counter_counts(request.seed, sample, rows, genes, found.mu, found.theta, found.pi_logits)


def rows_at_once(n_out: int) -> int:
    """Cells whose counts are drawn at once; of few genes too the normalisers are of all."""
    return max(16, _PIECE_BYTES // (4 * max(n_out, 2048)))


class SampledCells(store.Source):
    """Counts drawn from a model when they are read, as a source for `ingest` or `Atlas`.

    Of several samples, those of all cells come one after the other.

    Args:
        module: satisfies `types.GeneratesCounts`.
        source: of the cells.
        fields: the model's.
        request: genes, batch, library size, seed and number of samples.
        names: gives the names of the cells.
    """

    is_checked = True

    def __init__(
        self,
        module: torch.nn.Module,
        source: Source,
        fields: FieldMap,
        request: Request,
        names: Callable[[], NDArray[Any]],
    ) -> None:
        if len(request.batches) > 1:
            raise OptionError("counts averaged over batches are no counts; give transform_batch one, or none")
        self._module = generates(module).eval()
        self._source, self._fields, self._request, self._names = source, fields, request, names
        self._device = next(module.parameters()).device
        genes = request.genes
        self._genes = list(
            fields.var_names if genes is None else [fields.var_names[g] for g in genes.tolist()]
        )
        self._batches: NDArray[Any] | None = None

    @property
    def name(self) -> str:
        """How a person would call it."""
        return f"counts drawn from {type(self._module).__name__.removesuffix('Module')}"

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_samples * n_obs, genes)``."""
        return self._source.n_obs * self._request.n_samples, len(self._genes)

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of the cells; of several samples with the number of theirs."""
        names = np.asarray(self._names()).astype(store.STRING)
        n = self._request.n_samples
        if n == 1:
            return names
        return np.concatenate([np.strings.add(names, f"-sample{s}") for s in range(n)]).astype(store.STRING)

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        return np.array(self._genes, dtype=store.STRING)

    def read_rows(self, start: int, stop: int) -> CSR:
        """Draw the cells ``start`` to ``stop``."""
        pieces = []
        n, step = self._source.n_obs, rows_at_once(len(self._genes))
        code = self._request.batches[0] if self._request.batches else None
        while start < stop:
            sample, first = divmod(start, n)
            last = min(first + step, n, first + stop - start)
            block = self._source.read(first, last, self._device)
            counts = draw_counts(
                self._module, block, self._request, self._request.first_sample + sample, code
            )
            pieces.append(_sparse(counts))
            start += last - first
        return CSR.concatenate(pieces) if pieces else _sparse(np.zeros((0, len(self._genes)), np.int32))

    @property
    def obs_keys(self) -> list[str]:
        """The batch, where the model knows of batches."""
        return [] if self._fields.batch_key is None else [self._fields.batch_key]

    def obs_column(self, key: str) -> Any:
        """The batch that cells were drawn under."""
        import pandas as pd

        if key not in self.obs_keys:
            raise KeyError(key)
        if self._batches is None:
            n = self._source.n_obs
            if self._request.batches:
                codes = np.full(n, self._request.batches[0])
            else:
                step = piece_rows(self._source, len(self._genes))
                read = (self._source.read(a, min(a + step, n), self._device) for a in range(0, n, step))
                codes = np.concatenate([block.cells.batch_index.cpu().numpy() for block in read])
            self._batches = np.tile(codes, self._request.n_samples)
        return pd.Categorical.from_codes(self._batches, categories=list(self._fields.batch_categories))


def _sparse(counts: NDArray[np.int32]) -> CSR:
    return CSR.from_torch(torch.from_numpy(counts))


def sampled_matrices(
    module: torch.nn.Module, source: Source, n_vars: int, request: Request
) -> list[sp.csr_matrix]:
    """A sparse ``(n_obs, k)`` matrix for each sample; over several batches, the mean of the draws under each.

    Args:
        module: satisfies `types.GeneratesCounts`.
        source: of the cells.
        n_vars: genes of the model.
        request: what is asked.

    Raises:
        OptionError: they would take more than 2 GiB.
    """
    import scipy.sparse as sp

    known = generates(module).eval()
    device = next(module.parameters()).device
    codes = request.batches or (None,)
    parts: list[list[Any]] = [[] for _ in range(request.n_samples)]
    step, n_bytes = rows_at_once(n_vars if request.genes is None else len(request.genes)), 0
    for start in range(0, source.n_obs, step):
        stop = min(start + step, source.n_obs)
        block = source.read(start, stop, device)
        for k, part in enumerate(parts):
            sample = request.first_sample + k
            drawn = [sp.csr_matrix(draw_counts(known, block, request, sample, code)) for code in codes]
            part.append(drawn[0] if len(drawn) == 1 else sum(drawn[1:], drawn[0]) / np.float32(len(drawn)))
            n_bytes += part[-1].data.nbytes + part[-1].indices.nbytes
        if n_bytes > LARGEST_DENSE:
            whole = n_bytes / stop * source.n_obs / 2**30
            raise OptionError(
                f"{request.n_samples} counts of {source.n_obs:,} cells would take about {whole:.1f} GiB; "
                "ask for fewer with indices= or gene_list=, or write them with out='sampled.zarr'"
            )
    return [sp.vstack(part, "csr") for part in parts]


class _Parameters:
    """Answers with ``mean``, then ``dispersions`` and ``dropout`` where there are any: a layer each draw."""

    def __init__(self, module: Any, request: Request, has: list[str]) -> None:
        self._module, self._request, self._has = module, request, has

    def __call__(self, block: EncodedBlock, out: NDArray[np.float32]) -> None:
        request = self._request
        code = request.batches[0] if request.batches else None
        n_kept = 1 if request.return_mean else request.n_samples
        if request.return_mean:
            out[:] = 0
        for k in range(request.n_samples):
            found = parameters(self._module, block, request, request.first_sample + k, code)
            values = {"mean": found.mu, "dispersions": found.theta}
            if found.pi_logits is not None:
                values["dropout"] = found.pi_logits.sigmoid()
            for i, name in enumerate(self._has):
                value: Any = values[name]
                layer = out[i * n_kept + k % n_kept]
                if request.return_mean:
                    layer += value.cpu().numpy() / np.float32(request.n_samples)
                else:
                    layer[:] = value.cpu().numpy()


def likelihood_parameters(
    module: torch.nn.Module,
    source: Source,
    n_vars: int,
    request: Request,
    memory_budget: int | str | None = None,
) -> dict[str, da.Array]:
    """Lazy arrays of the parameters of p(x | z): ``mean``; ``dispersions`` and ``dropout`` if there are any.

    Each is ``(n_obs, k)`` float32, or ``(n_samples, n_obs, k)`` if each draw is asked for.

    Args:
        module: satisfies `types.GeneratesCounts`.
        source: of the cells.
        n_vars: genes of the model.
        request: what is asked.
        memory_budget: see `decode.chunk_bytes`.
    """
    if len(request.batches) > 1:
        raise OptionError("parameters of several batches have no mean; give transform_batch one, or none")
    known = generates(module).eval()
    has = ["mean"]
    has += ["dispersions"] if known.likelihood.has_theta else []
    has += ["dropout"] if known.likelihood.has_pi else []
    n_kept = 1 if request.return_mean else request.n_samples
    n_out = n_vars if request.genes is None else len(request.genes)
    n_layers = n_kept * len(has)
    layers = lazy(
        _Parameters(known, request, has), source, next(module.parameters()).device, n_out, n_layers=n_layers,
        rows_per_chunk=rows_of_chunks(source, n_vars, n_out * n_layers, memory_budget),
        rows_per_piece=rows_at_once(n_out),
    )  # fmt: skip
    return {
        name: layers[i] if n_kept == 1 else layers[i * n_kept : (i + 1) * n_kept]
        for i, name in enumerate(has)
    }


def computed_parameters(found: dict[str, da.Array]) -> dict[str, NDArray[np.float32]]:
    """All of them in memory, decoded once.

    Raises:
        OptionError: they would take more than 2 GiB.
    """
    import dask

    shape = (len(found), *found["mean"].shape)
    refuse_large(shape, "parameters", "ask for fewer with indices= or gene_list=, or for lazy=True")
    (values,) = dask.compute(found, scheduler="threads")  # type: ignore[attr-defined]
    return dict(values)


def latent_library_size(
    module: torch.nn.Module, source: Source, n_vars: int, *, give_mean: bool, seed: int
) -> NDArray[np.float32]:
    """``(n_obs, 1)`` library sizes: the mean of q(l|x), or a draw; what is observed, where it is.

    Raises:
        OptionError: a mean is asked of a library size that is not inferred.
    """
    is_latent = isinstance(module, InfersLibrary) and module.library_is_latent
    if give_mean and not is_latent:
        raise OptionError("the library size of this model is observed: give_mean=False gives it")
    module.eval()
    device = next(module.parameters()).device
    found = np.empty((source.n_obs, 1), np.float32)
    step = piece_rows(source, n_vars)
    for start in range(0, source.n_obs, step):
        block = source.read(start, min(start + step, source.n_obs), device)
        size = block.draw_library(seed, 0)
        if give_mean:
            assert block.library_scale is not None
            size = block.library * (0.5 * block.library_scale.square()).exp()
        found[start : start + len(size), 0] = size.cpu().numpy()
    return found


@dataclass(frozen=True)
class PriorCells:
    """Cells that nobody saw: z from its prior; batch, covariates and library size of a cell chosen at random.

    Where the library size is latent it is drawn from the prior of the batch.

    Args:
        module: whose prior it is.
        like: the cells that templates are chosen from.
        n_obs: how many.
        seed: of the choice.
        code: of the batch that all are of, or ``None`` for that of each template.
    """

    module: Any
    like: Encoded
    n_obs: int
    seed: int
    code: int | None = None
    is_stored: bool = True

    @torch.no_grad()
    def read(self, start: int, stop: int, device: torch.device) -> EncodedBlock:
        """The cells ``start`` to ``stop``."""
        rows = torch.arange(start, stop)
        u = counter_uniform(self.seed, 0, _CHOICE, rows, 1)[:, 0].double().numpy()
        block = self.like.take(np.minimum((u * len(self.like)).astype(np.int64), len(self.like) - 1), device)
        cells = replace(in_batch(block.cells, self.code), rows=rows.to(device))
        library, scale = block.library, block.library_scale
        if scale is not None:
            library = self.module.library_log_mean[cells.batch_index].exp()
            scale = self.module.library_log_var[cells.batch_index].sqrt()
        prior = self.module.from_prior(Noise(self.seed, 0, cells.rows))
        return EncodedBlock(prior, library, scale, cells, np.arange(start, stop))

    def log_normaliser(self, key: Key) -> None:
        """None are kept."""


@dataclass(frozen=True)
class NeighbouringCells:
    """Cells like one that is there: z from the posterior of one of its neighbours, the rest as in that cell.

    Args:
        like: the cells.
        cell: position of the one.
        neighbours: ``(k,)`` int64, positions of those that z is drawn from.
        n_obs: how many.
        seed: of the choice.
    """

    like: Encoded
    cell: int
    neighbours: NDArray[np.int64]
    n_obs: int
    seed: int
    is_stored: bool = True

    def read(self, start: int, stop: int, device: torch.device) -> EncodedBlock:
        """The cells ``start`` to ``stop``."""
        rows = torch.arange(start, stop)
        u = counter_uniform(self.seed, 0, _CHOICE, rows, 1)[:, 0].double().numpy()
        chosen = self.neighbours[
            np.minimum((u * len(self.neighbours)).astype(np.int64), len(self.neighbours) - 1)
        ]
        block = self.like.take(np.full(stop - start, self.cell), device)
        cells = replace(block.cells, rows=rows.to(device))
        return replace(
            block, qz=self.like.take(chosen, device).qz, cells=cells, positions=np.arange(start, stop)
        )

    def log_normaliser(self, key: Key) -> None:
        """None are kept."""


def numbered(word: str, n: int) -> NDArray[Any]:
    """``(n,)`` names of new cells: ``prior-0``, ``prior-1``, ..."""
    return np.array([f"{word}-{i}" for i in range(n)], dtype=store.STRING)


def nearest(cells: Encoded, cell: int, k: int) -> NDArray[np.int64]:
    """``(k,)`` positions of the cells whose means of z are nearest to a cell's, itself first."""
    distance = np.empty(len(cells), np.float32)
    point = np.asarray(cells.loc[cell], np.float32)
    for start in range(0, len(cells), 1 << 16):
        block = np.asarray(cells.loc[start : start + (1 << 16)], np.float32)
        distance[start : start + len(block)] = np.square(block - point).sum(1)
    distance[cell] = -1
    k = min(k, len(cells))
    found = np.argpartition(distance, k - 1)[:k]
    return found[np.argsort(distance[found], kind="stable")]
