"""Cells encoded and decoded by the workers of a Dask cluster: the model travels to each once, counts to none.

A task is told where its cells are and what is known of them besides their counts, reads them and gives a few
numbers a cell; or it decodes them, and writes rho where it is wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from atlasvi.infer.decode import Decoding, Request, in_batch, softmax_linear
from atlasvi.infer.encoded import (
    Encoded,
    EncodedBlock,
    FromCounts,
    encode_block,
    fingerprint,
    gathered,
    shares_of,
)
from atlasvi.store import cluster
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import Codes
from atlasvi.stream import pack_uncounted
from atlasvi.types import Minibatch

if TYPE_CHECKING:
    import distributed

# Cells of a task, and of them at a time in a worker's memory.
TASK_ROWS, READ_ROWS = 1 << 13, 1 << 10
# Where cells are, and all that is known of them but their counts.
Located: TypeAlias = tuple[cluster.Block, Minibatch]


def send_module(client: distributed.Client, module: torch.nn.Module) -> Any:
    """A module in evaluation mode, on the CPU of each worker."""
    return cluster.send_to_all(client, copy.deepcopy(module).cpu().eval())


def located(atlas: Atlas, codes: Codes, positions: NDArray[np.int64]) -> list[Located]:
    """Some cells, `READ_ROWS` at a time; counts will be of the model's genes.

    Args:
        atlas: of stores on disk.
        codes: of its cells.
        positions: ``(n,)`` int64.
    """
    view = atlas[:, codes.gene_columns]
    parts = (positions[start : start + READ_ROWS] for start in range(0, len(positions), READ_ROWS))
    return [(cluster.locate(view, at), pack_uncounted(at, codes, atlas.numbers_of(at))) for at in parts]


def tasks(n: int, n_workers: int) -> list[slice]:
    """Ranges of ``n`` cells: large, but some for every worker."""
    rows = min(TASK_ROWS, max(READ_ROWS, -(-n // (4 * n_workers))))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def encode_on(client: distributed.Client, module: torch.nn.Module, atlas: Atlas, codes: Codes) -> Encoded:
    """`encode_cells` of all cells of an atlas, by the workers of a cluster.

    Args:
        client: of the cluster, whose workers must see the store under the same path.
        module: satisfies `types.Encodes` and `types.Decodes`.
        atlas: of stores on disk.
        codes: of its cells.

    Raises:
        OptionError: no client, or cells of an AnnData in memory.
    """
    n_workers = cluster.count_readers(client)
    cluster.check_places(atlas)
    sent = send_module(client, module)
    ranges = tasks(atlas.n_obs, n_workers)
    calls = ((sent, located(atlas, codes, np.arange(part.start, part.stop))) for part in ranges)
    with closing(cluster.in_order(client, _encode, calls, ahead=2 * n_workers)) as shares:
        return gathered(shares, codes, atlas.row_numbers, atlas.read_names, fingerprint(module))


def _encode(module: Any, cells: Sequence[Located]) -> dict[str, NDArray[np.float32]]:
    """The task."""
    found = [shares_of(block) for block in _encoded(module, cells)]
    return {key: np.concatenate([part[key] for part in found]) for key in found[0]}


def _encoded(module: Any, cells: Sequence[Located]) -> Iterator[EncodedBlock]:
    for block, known in cells:
        yield encode_block(module, replace(known, counts=block.read()), np.arange(len(known)))


def decode_on(
    client: distributed.Client,
    module: torch.nn.Module,
    request: Request,
    n_vars: int,
    cells: Callable[[int, int], Sequence[Located] | EncodedBlock],
    array: Path,
    ranges: Sequence[tuple[int, int]],
) -> Iterator[int]:
    """Have the workers of a cluster decode cells and write them; gives the number of cells done so far.

    Args:
        client: of the cluster, whose workers must see the stores and ``array`` under the same path.
        module: satisfies `types.Decodes`.
        request: what is asked.
        n_vars: genes of the model.
        cells: ``(start, stop) ->`` where they are, from `located`, or their latents.
        array: a Zarr array, cells x genes.
        ranges: ``(start, stop)``, a chunk or several each: two workers never write to the same one.
    """
    n_workers = cluster.count_readers(client)
    sent = send_module(client, module)
    where = str(array.absolute())
    if request.genes is not None:
        request = replace(request, genes=request.genes.cpu())
    calls = ((sent, request, n_vars, cells(start, stop), where, start) for start, stop in ranges)
    with closing(cluster.in_order(client, _decode, calls, ahead=2 * n_workers)) as written:
        for (_, stop), _ in zip(ranges, written, strict=True):
            yield stop


def _decode(
    module: Any,
    request: Request,
    n_vars: int,
    cells: Sequence[Located] | EncodedBlock,
    array: str,
    start: int,
) -> None:
    """The task."""
    blocks = [cells] if isinstance(cells, EncodedBlock) else _encoded(module, cells)
    # What normalisers are known stays where it is: to send them would cost more than they save.
    nothing_kept = FromCounts(module, 0, lambda *_: cells)  # type: ignore[arg-type]
    decoding = Decoding(module, request, nothing_kept, n_vars)
    found = []
    for block in blocks:
        rho = np.empty((len(block.positions), decoding.n_out), np.float32)
        decoding(block, rho)
        found.append(rho)
    rho = np.concatenate(found)
    target: Any = zarr.open_array(array, mode="r+")
    target[start : start + len(rho)] = rho


def fill_normalisers_on(
    client: distributed.Client,
    module: torch.nn.Module,
    cells: Encoded,
    batches: Iterable[int | None],
    n_samples: int,
) -> None:
    """`compact.fill_normalisers`, by the workers of a cluster: they are sent latents.

    Args:
        client: of the cluster.
        module: none are kept of one whose expression is no softmax.
        cells: where they are kept.
        batches: codes, or ``None`` for each cell's own.
        n_samples: posterior samples.
    """
    if softmax_linear(module, "float32") is None:
        return
    n_workers = cluster.count_readers(client)
    sent = send_module(client, module)
    wanted = [(code, sample) for code in batches for sample in range(n_samples)]
    ranges = tasks(len(cells), n_workers)
    cpu = torch.device("cpu")
    calls = ((sent, cells.read(part.start, part.stop, cpu), wanted) for part in ranges)
    found: Generator[list[NDArray[np.float32]]] = cluster.in_order(
        client, _normalise, calls, ahead=2 * n_workers
    )
    with closing(found):
        for part, values in zip(ranges, found, strict=True):
            for (code, sample), of_draw in zip(wanted, values, strict=True):
                cells.log_normaliser((0, sample, code, "float32"))[part] = of_draw


@torch.no_grad()
def _normalise(
    module: Any, block: EncodedBlock, wanted: Sequence[tuple[int | None, int]]
) -> list[NDArray[np.float32]]:
    """The task."""
    head = softmax_linear(module, "float32")
    assert head is not None
    return [
        head.log_normaliser(module.hidden(block.draw(0, sample), in_batch(block.cells, code))).numpy()
        for code, sample in wanted
    ]


__all__ = ["decode_on", "encode_on", "fill_normalisers_on", "located", "send_module", "tasks"]
