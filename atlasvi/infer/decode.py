"""rho on demand: a lazy cells x genes array of which only the chunks asked for are ever made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from atlasvi_kernels import SoftmaxLinear
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.infer.encoded import EncodedBlock, Source
from atlasvi.memory import as_bytes
from atlasvi.stream import default_workers
from atlasvi.types import DecodesLinearly, Minibatch

if TYPE_CHECKING:
    import dask.array as da

# A chunk is made piece by piece, for a piece needs its logits for all genes several times over.
CHUNK_BYTES = 16 << 20
PIECE_BYTES = 4 << 20
# Cells of a chunk at most where latents are stored, and cells read and encoded at once where they are not.
_STORED_ROWS, _READ_ROWS = 16_384, 512


@dataclass(frozen=True)
class Request:
    """What is asked of each cell.

    Args:
        genes: ``(k,)`` int64, the model's genes wanted, or ``None`` for all.
        batches: codes of the batches to decode under, averaged; empty for each cell's own.
        library_size: rho is multiplied by it; ``None`` for each cell's own library size.
        n_samples: draws of z.
        first_sample: number of the first of them.
        seed: of those draws.
        return_mean: average over draws, or give each.
        precision: of the product with the last layer, ``"float32"`` or ``"bfloat16"``.
    """

    genes: torch.Tensor | None = None
    batches: tuple[int, ...] = ()
    library_size: float | None = 1.0
    n_samples: int = 1
    first_sample: int = 0
    seed: int = 0
    return_mean: bool = True
    precision: str = "float32"


# Of a block of cells, into ``(B, k)`` or ``(n_layers, B, k)``; called from any thread.
Answer = Callable[[EncodedBlock, NDArray[np.float32]], None]


class Decoding:
    """A request made ready for a module: weights are laid out once, then block after block is decoded.

    Args:
        module: satisfies `types.Decodes`; its last layer is used directly if it `types.DecodesLinearly`.
        request: what is asked.
        source: whose blocks will come; may keep normalisers.
        n_vars: genes of the model.
    """

    def __init__(self, module: torch.nn.Module, request: Request, source: Source, n_vars: int) -> None:
        self._module: Any = module
        self._request, self._source, self._n_vars = request, source, n_vars
        self.n_out = n_vars if request.genes is None else len(request.genes)
        self._head = softmax_linear(module, request.precision, request.genes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the weights as they are laid out for this machine."""
        return Decoding, (self._module, self._request, self._source, self._n_vars)

    @torch.no_grad()
    def __call__(self, block: EncodedBlock, out: NDArray[np.float32]) -> None:
        """Write ``(B, k)`` of some cells, or ``(n_samples, B, k)``.

        A draw depends on (seed, sample, cell) alone: however the cells are cut, they get the same.
        """
        request = self._request
        codes: Sequence[int | None] = request.batches or (None,)
        variants = [(code, in_batch(block.cells, code)) for code in codes]
        n_kept = 1 if request.return_mean else request.n_samples
        n_averaged = len(codes) * request.n_samples // n_kept
        layers = out[None] if request.return_mean else out
        for k in range(request.n_samples):
            sample = request.first_sample + k
            z = block.draw(request.seed, sample)
            factor = self._factor(block, sample) / n_averaged
            for i, (code, cells) in enumerate(variants):
                add = i > 0 or k >= n_kept
                self._into(layers[k % n_kept], block, z, cells, factor, (request.seed, sample, code), add)

    def _factor(self, block: EncodedBlock, sample: int) -> torch.Tensor:
        size = self._request.library_size
        if size is None:
            return block.draw_library(self._request.seed, sample)
        return torch.full_like(block.library, size)

    def _into(
        self,
        out: NDArray[np.float32],
        block: EncodedBlock,
        z: torch.Tensor,
        cells: Minibatch,
        factor: torch.Tensor,
        draw: tuple[int, int, int | None],
        add: bool,
    ) -> None:
        if self._head is None:
            share = self._module.decode_log_rho(z, cells, self._request.genes).exp_()
            share = share.mul_(factor.unsqueeze(1)).cpu().numpy()
            out[:] = out + share if add else share
            return
        h = self._module.hidden(z, cells)
        known = self._source.log_normaliser((*draw, self._request.precision))
        normaliser = None
        if known is not None and self._request.genes is not None:
            normaliser = self._known(known, block.positions, h)
        self._head.into(out, h, factor=factor, log_normaliser=normaliser, add=add)

    def _known(
        self, kept: NDArray[np.float32], positions: NDArray[np.int64], h: torch.Tensor
    ) -> torch.Tensor:
        assert self._head is not None
        found = kept[positions]
        missing = np.isnan(found)
        if missing.any():
            new = self._head.log_normaliser(h[torch.from_numpy(missing).to(h.device)]).cpu().numpy()
            found[missing] = kept[positions[missing]] = new
        return torch.from_numpy(found).to(h.device)


def softmax_linear(
    module: torch.nn.Module, precision: str, genes: torch.Tensor | None = None
) -> SoftmaxLinear | None:
    """The last layer of a module, its weights laid out; ``None`` where rho is no softmax of one.

    Raises:
        OptionError: a precision that is not ``"float32"``, and no such layer.
    """
    weights = module.softmax_head() if isinstance(module, DecodesLinearly) else None
    if weights is not None:
        return SoftmaxLinear(*weights, genes, precision=precision)
    if precision != "float32":
        raise OptionError(
            f"precision={precision!r} is for models whose expression is a softmax; use 'float32'"
        )
    return None


def in_batch(cells: Minibatch, code: int | None) -> Minibatch:
    """The cells as if they came from a batch, or as they are."""
    if code is None:
        return cells
    return replace(cells, batch_index=torch.full_like(cells.batch_index, code))


def chunk_rows(n_obs: int, n_cols: int, chunk_bytes: int | None = None) -> int:
    """Cells a chunk, so that a dense block of them is about `CHUNK_BYTES`, or what is said."""
    size = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    return int(np.clip(size // (4 * max(n_cols, 1)), 64, max(64, n_obs)))


def chunk_bytes(memory_budget: int | str | None) -> int | None:
    """Bytes of a chunk, so that the chunks in work take half of a budget; the rest is what makes them.

    Raises:
        OptionError: a budget that is no size.
    """
    return None if memory_budget is None else as_bytes(memory_budget) // (2 * default_workers())


def rows_of_chunks(source: Source, n_vars: int, n_out: int, memory_budget: int | str | None) -> int:
    """Cells a chunk. Where latents are stored few genes cost little, and a chunk has many cells.

    Args:
        source: of the cells.
        n_vars: genes of the model.
        n_out: numbers a cell: genes asked for, times draws that are kept.
        memory_budget: see `chunk_bytes`.
    """
    size = chunk_bytes(memory_budget)
    if not source.is_stored:
        return chunk_rows(source.n_obs, max(n_vars, n_out), size)
    return min(_STORED_ROWS, chunk_rows(source.n_obs, n_out, size))


def piece_rows(source: Source, n_out: int) -> int:
    """Cells that are read, and decoded, at once."""
    if source.is_stored:
        return _STORED_ROWS
    return max(64, min(_READ_ROWS, 4 * PIECE_BYTES // (4 * max(n_out, 1))))


def lazy(
    answer: Answer,
    source: Source,
    device: torch.device,
    n_out: int,
    *,
    n_layers: int | None = None,
    rows_per_chunk: int,
    rows_per_piece: int,
) -> da.Array:
    """A ``dask.array`` of what is answered of each cell, ``(n_obs, n_out)`` float32.

    Args:
        answer: of a block of cells.
        source: of the cells.
        device: where blocks are decoded.
        n_out: numbers a cell.
        n_layers: answers are ``(n_layers, B, n_out)``, and so is the array; ``None``: no such axis.
        rows_per_chunk: cells a chunk.
        rows_per_piece: cells that are read and answered at once.
    """
    import dask.array as da

    lead = () if n_layers is None else (n_layers,)
    starts = range(0, max(source.n_obs, 1), rows_per_chunk)
    bounds = [(start, min(start + rows_per_chunk, source.n_obs)) for start in starts]
    name = f"decode-{np.random.default_rng().integers(1 << 62):x}"
    # The model is a node of the graph, which tasks name: on a cluster it travels once to a worker, not with
    # every chunk.
    graph: dict[Any, Any] = {f"{name}-by": _Chunks(answer, source, device, lead, n_out, rows_per_piece)}
    for i, (start, stop) in enumerate(bounds):
        graph[name, *(0 for _ in lead), i, 0] = (_Chunks.make, f"{name}-by", start, stop)
    return da.Array(
        graph,
        name,
        chunks=(*((n,) for n in lead), tuple(stop - start for start, stop in bounds), (n_out,)),
        dtype=np.float32,
        meta=np.empty((0,) * (2 + len(lead)), np.float32),
    )


@dataclass(frozen=True)
class _Chunks:
    """Makes chunks; arguments as `lazy`, ``lead`` is the first axis if there is one."""

    answer: Answer
    source: Source
    device: torch.device
    lead: tuple[int, ...]
    n_out: int
    rows_per_piece: int

    def make(self, start: int, stop: int) -> NDArray[np.float32]:
        """The task."""
        found = np.empty((*self.lead, stop - start, self.n_out), np.float32)
        for a in range(start, stop, self.rows_per_piece):
            b = min(a + self.rows_per_piece, stop)
            self.answer(self.source.read(a, b, self.device), found[..., a - start : b - start, :])
        return found


def chunk_of(array: da.Array, index: int) -> NDArray[np.float32]:
    """A chunk of rows of a lazy cells x genes array, computed here and now; ``compute`` would copy it."""
    import dask
    from dask.optimization import cull

    key = (array.name, index, 0)
    # Of all chunks' tasks this one's alone: to look at all of them for each chunk takes longer than decoding.
    tasks, _ = cull(array.__dask_graph__(), [key])
    found: NDArray[np.float32] = dask.get(tasks, key)  # type: ignore[attr-defined]
    return found


def lazy_expression(
    module: torch.nn.Module,
    source: Source,
    n_vars: int,
    request: Request,
    *,
    memory_budget: int | str | None = None,
) -> da.Array:
    """A ``dask.array`` of rho, ``(n_obs, k)`` float32, or ``(n_samples, n_obs, k)`` of each draw.

    Args:
        module: satisfies `types.Decodes`; on its device.
        source: of the cells.
        n_vars: genes of the model.
        request: what is asked.
        memory_budget: see `chunk_bytes`.
    """
    module.eval()
    answer = Decoding(module, request, source, n_vars)
    n_layers = None if request.return_mean else request.n_samples
    n_numbers = answer.n_out * (n_layers or 1)
    return lazy(
        answer, source, next(module.parameters()).device, answer.n_out, n_layers=n_layers,
        rows_per_chunk=rows_of_chunks(source, n_vars, n_numbers, memory_budget),
        rows_per_piece=piece_rows(source, n_numbers),
    )  # fmt: skip


__all__ = [
    "Decoding",
    "Request",
    "chunk_of",
    "chunk_rows",
    "in_batch",
    "lazy",
    "lazy_expression",
    "piece_rows",
    "rows_of_chunks",
    "softmax_linear",
]
