"""Cells as a decoder needs them: q(z|x), library size and codes, from counts or from where they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import ModelError
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import Codes
from atlasvi.stream import pack, pack_uncounted
from atlasvi.types import Decodes, Encodes, InfersLibrary, Minibatch, Noise, Posterior

# Noise streams of the draws of z and of l; models use the same for theirs, at training steps of another seed.
_Z, _LIBRARY = 0, 1

# (seed, sample, code of the batch or None for each cell's own, precision)
Key = tuple[int, int, "int | None", str]


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """What a decoder needs of some cells.

    Args:
        qz: q(z|x), B cells.
        library: ``(B,)`` float32, library size; the median of q(l|x) where it is latent.
        library_scale: ``(B,)`` float32, standard deviation of log l; ``None`` where it is observed.
        cells: codes and numbers of the cells; of what was stored, the counts are empty.
        positions: ``(B,)`` int64, the cells among those of their source.
    """

    qz: Posterior
    library: torch.Tensor
    library_scale: torch.Tensor | None
    cells: Minibatch
    positions: NDArray[np.int64]

    def draw(self, seed: int, sample: int) -> torch.Tensor:
        """``(B, n_latent)`` a draw of z, by (seed, sample, cell) alone."""
        return self.qz.rsample(Noise(seed, sample, self.cells.rows).normal(self.qz.loc.shape[1], _Z))

    def draw_library(self, seed: int, sample: int) -> torch.Tensor:
        """``(B,)`` a draw of the library size; the library size where it is observed."""
        if self.library_scale is None:
            return self.library
        epsilon = Noise(seed, sample, self.cells.rows).normal(1, _LIBRARY).squeeze(1)
        return self.library * (self.library_scale * epsilon).exp()


@torch.no_grad()
def encode_block(module: Any, minibatch: Minibatch, positions: NDArray[np.int64]) -> EncodedBlock:
    """Encode some cells from their counts."""
    assert isinstance(module, Encodes) and isinstance(module, Decodes)
    if isinstance(module, InfersLibrary) and module.library_is_latent:
        ql = module.encode_library(minibatch)
        library, scale = ql.loc.squeeze(1).exp(), ql.scale.squeeze(1)
    else:
        library, scale = module.library(minibatch)[0], None
    return EncodedBlock(module.encode(minibatch), library, scale, minibatch, positions)


class Source(Protocol):
    """Cells that can be decoded."""

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        ...

    @property
    def is_stored(self) -> bool:
        """Whether latents are there already: then many cells may be had at a time."""
        ...

    def read(self, start: int, stop: int, device: torch.device) -> EncodedBlock:
        """The cells ``start`` to ``stop``, from any thread."""
        ...

    def log_normaliser(self, key: Key) -> NDArray[np.float32] | None:
        """``(N,)`` normalisers by the positions of blocks, NaN where not known; ``None``: none kept."""
        ...


@dataclass(frozen=True)
class ReadCounts:
    """Reads cells of an atlas.

    Args:
        view: of the model's genes.
        codes: of its cells.
        positions: ``(n,)`` int64, the cells wanted; all when ``None``.
    """

    view: Atlas
    codes: Codes
    positions: NDArray[np.int64] | None = None

    def __call__(self, start: int, stop: int) -> Minibatch:
        """The cells ``start`` to ``stop`` of those wanted."""
        chosen = np.arange(start, stop) if self.positions is None else self.positions[start:stop]
        return pack(self.view.read_rows(chosen), chosen, self.codes, self.view.numbers_of(chosen))


@dataclass(frozen=True)
class FromCounts:
    """Cells that are read and encoded when they are asked for.

    Args:
        module: encodes.
        n_obs: number of cells.
        read_counts: ``(start, stop) -> Minibatch``, from any thread.
    """

    module: Any
    n_obs: int
    read_counts: Callable[[int, int], Minibatch]
    is_stored: bool = False

    def read(self, start: int, stop: int, device: torch.device) -> EncodedBlock:
        """The cells ``start`` to ``stop``."""
        minibatch = self.read_counts(start, stop).to(device)
        return encode_block(self.module, minibatch, np.arange(start, stop))

    def log_normaliser(self, key: Key) -> None:
        """None are kept."""


class Encoded:
    """The latents of an atlas with all that a decoder needs besides, in place of the counts.

    Made by ``model.encode(data)``, or read from a published atlas. Where a model takes data to decode, it
    takes this. A few numbers a cell are held; and the log-normaliser of each posterior sample and batch that
    was asked for once, 4 bytes a cell, so that some genes then cost those genes and no others.

    Args:
        loc: ``(n_obs, n_latent)`` float32 or float16, means of q(z|x).
        scale: the same, standard deviations.
        library: ``(n_obs,)`` float32, library sizes; medians where they are latent.
        library_scale: ``(n_obs,)`` float32, standard deviations of log l, or ``None``.
        codes: batches and covariates of the cells.
        rows: ``(n_obs,)`` int64, the cells' numbers in the atlas, to which draws belong.
        read_names: ``(start, stop) ->`` names of the cells.
        weights: `fingerprint` of the model that made it.

    Example:
        >>> cells = model.encode()
        >>> len(cells) == atlas.n_obs
        True
        >>> rho = model.expression(cells, genes=["G0001"])
    """

    is_stored = True

    def __init__(
        self,
        loc: NDArray[Any],
        scale: NDArray[Any],
        library: NDArray[np.float32],
        library_scale: NDArray[np.float32] | None,
        codes: Codes,
        rows: NDArray[np.int64],
        read_names: Callable[[int, int], NDArray[Any]],
        weights: str,
    ) -> None:
        self.loc, self.scale = loc, scale
        self.library, self.library_scale = library, library_scale
        self.codes, self.rows = codes, rows
        self.read_names, self.weights = read_names, weights
        self.normalisers: dict[Key, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.loc)

    def __repr__(self) -> str:
        kept = len(self.normalisers)
        return f"Encoded({len(self):,} cells, {self.loc.shape[1]} dimensions, {kept} normalisers kept)"

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.loc)

    def check(self, module: torch.nn.Module) -> None:
        """Make sure that it is the model's own.

        Raises:
            ModelError: the weights are not those that encoded the cells.
        """
        if fingerprint(module) != self.weights:
            raise ModelError(
                "these latents were encoded by other weights than the model's now; encode again: "
                "model.encode(data)"
            )

    def read(self, start: int, stop: int, device: torch.device) -> EncodedBlock:
        """The cells ``start`` to ``stop``."""
        return self.take(np.arange(start, stop), device)

    def take(self, positions: NDArray[np.int64], device: torch.device) -> EncodedBlock:
        """Some cells, in the order asked."""

        def at(values: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values[positions], np.float32)).to(device)

        return EncodedBlock(
            Posterior(at(self.loc), at(self.scale)),
            at(self.library),
            None if self.library_scale is None else at(self.library_scale),
            pack_uncounted(positions, self.codes, self.rows[positions]).to(device),
            positions,
        )

    def log_normaliser(self, key: Key) -> NDArray[np.float32]:
        """``(n_obs,)`` normalisers, NaN where not known yet; who computes some writes them there."""
        if key not in self.normalisers:
            # setdefault is one step to other threads: all get the same.
            self.normalisers.setdefault(key, np.full(len(self), np.nan, np.float32))
        return self.normalisers[key]


@dataclass(frozen=True)
class Selected:
    """Some cells of an `Encoded`.

    Args:
        cells: all of them.
        positions: ``(n_obs,)`` int64, those wanted.
    """

    cells: Encoded
    positions: NDArray[np.int64]
    is_stored: bool = True

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.positions)

    def read(self, start: int, stop: int, device: torch.device) -> EncodedBlock:
        """The cells ``start`` to ``stop`` of those wanted."""
        return self.cells.take(self.positions[start:stop], device)

    def log_normaliser(self, key: Key) -> NDArray[np.float32]:
        """Those of all cells."""
        return self.cells.log_normaliser(key)


@torch.no_grad()
def encode_cells(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    codes: Codes,
    rows: NDArray[np.int64],
    read_names: Callable[[int, int], NDArray[Any]],
) -> Encoded:
    """Encode the cells of an atlas, as they are streamed.

    Args:
        module: satisfies `types.Encodes` and `types.Decodes`; on its device.
        minibatches: all cells, in their order.
        codes: of these cells.
        rows: their numbers.
        read_names: their names.
    """
    module.eval()
    device = next(module.parameters()).device
    encoded = (encode_block(module, cells.to(device), np.arange(len(cells))) for cells in minibatches)
    return gathered(map(shares_of, encoded), codes, rows, read_names, fingerprint(module))


def shares_of(block: EncodedBlock) -> dict[str, NDArray[np.float32]]:
    """What `Encoded` holds of some cells, by name."""
    found = {"loc": block.qz.loc, "scale": block.qz.scale, "library": block.library}
    if block.library_scale is not None:
        found["library_scale"] = block.library_scale
    return {key: values.cpu().numpy() for key, values in found.items()}


def gathered(
    shares: Iterator[dict[str, NDArray[np.float32]]],
    codes: Codes,
    rows: NDArray[np.int64],
    read_names: Callable[[int, int], NDArray[Any]],
    weights: str,
) -> Encoded:
    """Blocks of cells, from `shares_of`, as they come one after the other; arguments as `Encoded`."""
    # Filled as they come: a list of pieces would be held beside the whole.
    parts: dict[str, NDArray[np.float32]] = {}
    start = 0
    for new in shares:
        for key, values in new.items():
            if key not in parts:
                parts[key] = np.empty((len(rows), *values.shape[1:]), np.float32)
            parts[key][start : start + len(values)] = values
        start += len(new["library"])
    return Encoded(
        parts["loc"], parts["scale"], parts["library"], parts.get("library_scale"), codes, rows, read_names,
        weights,
    )  # fmt: skip


def fingerprint(module: torch.nn.Module) -> str:
    """A checksum of a module's weights, without what it names as ``aside``: milliseconds for each 10 MB."""
    found, aside = hashlib.sha256(), getattr(module, "aside", ())
    for name, value in sorted(module.state_dict().items()):
        if name in aside:
            continue
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy())
    return found.hexdigest()


__all__ = [
    "Encoded",
    "EncodedBlock",
    "FromCounts",
    "Key",
    "ReadCounts",
    "Selected",
    "Source",
    "encode_block",
    "encode_cells",
    "fingerprint",
    "gathered",
    "shares_of",
]
