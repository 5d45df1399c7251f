"""Publishing an atlas without its counts, and asking what was published."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from atlasvi.errors import ObsError, StoreError
from atlasvi.files import replacing_folder
from atlasvi.infer.compact import (
    CELLS,
    INDEX,
    MODEL,
    RHO,
    PublishedCells,
    RhoStore,
    fill_normalisers,
    read_cells,
    read_index,
    write_cells,
    write_index,
)
from atlasvi.infer.encoded import Encoded, fingerprint
from atlasvi.infer.on_cluster import fill_normalisers_on
from atlasvi.models import load
from atlasvi.models.arguments import at_least_one, one_of
from atlasvi.models.base import CountModel
from atlasvi.store.atlas import Atlas
from atlasvi.store.frame import check_column

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import distributed
    import pandas as pd

    from atlasvi.models.data import Data


logger = logging.getLogger(__name__)


class CompactAtlas:
    """A published atlas: latents and a decoder, from which anyone decodes, samples and compares groups.

    What else the model decodes (``denoised_counts``, ``technical_zeros``, ...) it decodes of ``cells`` too,
    given in place of data. What asks for counts, such as ``get_elbo``, has none here.

    Args:
        path: of the folder.
        model: its model.
        cells: its latents.

    Example:
        >>> publish(model, atlas, "my.atlasvi", overwrite=True)
        >>> compact = open_compact("my.atlasvi")
        >>> compact.expression(genes=["G0003"])[:5].compute().shape
        (5, 1)
    """

    def __init__(self, path: Path, model: CountModel, cells: Encoded) -> None:
        self.path, self.model, self.cells = path, model, cells

    def __repr__(self) -> str:
        n_obs, n_vars = self.shape
        return f"CompactAtlas({n_obs:,} cells x {n_vars:,} genes, {str(self.path)!r})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return len(self.cells), self.model.fields.n_vars

    @property
    def obs(self) -> pd.DataFrame:
        """The columns of obs that were published."""
        from anndata.io import read_elem

        frame: pd.DataFrame = read_elem(zarr.open_group(self.path / CELLS, mode="r")["obs"])
        return frame

    @property
    def atlas(self) -> Atlas:
        """Names of the cells and their columns, as an `Atlas` that has no counts to read."""
        return Atlas(PublishedCells(self.path))

    @property
    def var_names(self) -> tuple[str, ...]:
        """Names of the genes."""
        return self.model.fields.var_names

    @property
    def store(self) -> RhoStore:
        """A read-only Zarr store: an AnnData whose layer ``rho`` is decoded when it is read."""
        return RhoStore(self.path, self.model.module, self.cells, self.model.fields.n_vars)

    def to_anndata(self) -> anndata.AnnData:
        """An AnnData with obs, var, latents in obsm, and rho as a lazy layer of dask chunks.

        Example:
            >>> publish(model, atlas, "my.atlasvi", overwrite=True)
            >>> adata = open_compact("my.atlasvi").to_anndata()
            >>> adata[:3].layers["rho"].compute().shape == (3, atlas.n_vars)
            True
        """
        import anndata
        import dask.array as da
        import pandas as pd

        group: Any = zarr.open_group(self.store, mode="r")
        return anndata.AnnData(
            obs=self.obs,
            var=pd.DataFrame(index=list(self.var_names)),
            obsm={key: group[f"obsm/{key}"][...] for key in ("X_scVI", "X_scVI_scale")},
            layers={"rho": da.from_zarr(group[RHO])},
        )

    def expression(
        self,
        *,
        cells: Any = None,
        genes: Sequence[str] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        library_size: float | str = 1,
        n_samples: int = 1,
        return_mean: bool = True,
        seed: int = 0,
        precision: str = "float32",
        memory_budget: int | str | None = None,
    ) -> da.Array:
        """Normalised expression as a lazy ``dask.array``: `CountModel.expression` of the published cells."""
        return self.model.expression(
            self.cells, cells=cells, genes=genes, transform_batch=transform_batch,
            library_size=library_size, n_samples=n_samples, return_mean=return_mean, seed=seed,
            precision=precision, memory_budget=memory_budget,
        )  # fmt: skip

    def sample(
        self,
        *,
        cells: Any = None,
        genes: Sequence[str] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 1,
        seed: int = 0,
        out: str | Path | None = None,
    ) -> Any:
        """Counts: `CountModel.posterior_predictive_sample` of the published cells."""
        return self.model.posterior_predictive_sample(
            self.cells, cells, transform_batch, n_samples, genes, seed=seed, out=out
        )

    def differential_expression(
        self,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Any = None,
        idx2: Any = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Which genes differ between groups of the published cells: `CountModel.differential_expression`.

        Args:
            groupby: column of obs that was published.
            group1: levels to compare; all when ``None``.
            group2: level to compare them with; all other cells when ``None``.
            idx1: in place of ``groupby``: positions, a mask, or a query of obs.
            idx2: cells of group 2, likewise; all other cells when ``None``.
            **options: the rest, by name. Means of raw counts are not known here; ``mode="change"`` needs
                ``pseudocounts``, which is else estimated from them.

        Example:
            >>> publish(model, atlas, "my.atlasvi", overwrite=True)
            >>> compact = open_compact("my.atlasvi")
            >>> found = compact.differential_expression("cell_type", "T", silent=True)
            >>> len(found)
            30
        """
        return self.model.differential_expression(
            self.atlas, groupby, group1, group2, idx1, idx2, encoded=self.cells,
            **{"all_stats": False, **options},
        )  # fmt: skip


def publish(
    model: CountModel,
    data: Data | None = None,
    out: str | Path = "my.atlasvi",
    *,
    dtype: str = "float16",
    obs: str | Sequence[str] | None = None,
    transform_batch: Sequence[str] = (),
    n_samples: int = 1,
    overwrite: bool = False,
    client: distributed.Client | None = None,
) -> None:
    """Write latents, library sizes, normalisers, obs and the model to a folder that needs no counts.

    About 80 bytes a cell with ten dimensions in float16, besides names and columns.

    Args:
        model: trained.
        data: the cells; those of the model when ``None``.
        out: the folder.
        dtype: of means and scales of the latents, ``"float16"`` or ``"float32"``. Normalisers are of these,
            so that everyone decodes the same.
        obs: columns of obs to publish; when ``None`` all but those of a kind that `ingest` leaves out too,
            such as dates, which are logged.
        transform_batch: batches whose normalisers are kept too, besides each cell's own.
        n_samples: posterior samples (of seed 0) whose normalisers are kept.
        overwrite: replace a published atlas that is there.
        client: of a Dask cluster whose workers encode and normalise; see `CountModel.encode`.

    Raises:
        StoreError: there is something already.
        ObsError: columns that there are not or that cannot be written, or batches that the model does not
            know.
        SpaceError: the disk is full; nothing is left behind.

    Example:
        >>> publish(model, atlas, "my.atlasvi", overwrite=True)
    """
    out = Path(out)
    one_of("dtype", dtype, ("float16", "float32"))
    at_least_one("n_samples", n_samples)
    if out.exists() and not (out / INDEX).is_file():
        raise StoreError(f"{str(out)!r} is no published atlas and will not be replaced; name another place")
    if out.exists() and not overwrite:
        raise StoreError(f"there is a {str(out)!r} already; pass overwrite, or name another place")
    codes = model._batch_codes(transform_batch or None)
    atlas, _ = model._data(data)
    columns = _columns_to_publish(atlas, obs)
    cells = model.encode(data, client=client)
    cells.loc, cells.scale = cells.loc.astype(dtype), cells.scale.astype(dtype)
    n_vars = model.fields.n_vars
    if client is None:
        fill_normalisers(model.module, cells, n_vars, (None, *codes), n_samples)
    else:
        fill_normalisers_on(client, model.module, cells, (None, *codes), n_samples)
    with replacing_folder(out) as new:
        model.save(new / MODEL)
        write_cells(new, atlas, cells, model.fields.var_names, columns)
        write_index(
            new, n_obs=len(cells), n_vars=n_vars, dtype=dtype, weights=fingerprint(model.module),
            model=type(model).__name__,
        )  # fmt: skip


def _columns_to_publish(atlas: Atlas, obs: str | Sequence[str] | None) -> list[str]:
    """Columns of obs that can be written; what cannot is left out, or refused where it was asked for."""
    columns = []
    asked = [obs] if isinstance(obs, str) else obs
    for key in dict.fromkeys(atlas.obs_keys if asked is None else asked):
        if key not in atlas.obs_keys:
            raise ObsError(f"obs of {atlas.name} has no column {key!r}; it has {', '.join(atlas.obs_keys)}")
        try:
            check_column(key, atlas.obs_column(key))
        except TypeError as error:
            if obs is not None:
                raise ObsError(
                    f"obs[{key!r}] of {atlas.name} cannot be published: {error}; make it text, categories or "
                    "numbers, or leave it out of obs="
                ) from error
            logger.warning("publish: left out: obs[%r]: %s", key, error)
            continue
        columns.append(key)
    return columns


def open_compact(path: str | Path, *, verify: bool = True) -> CompactAtlas:
    """Open what `publish` wrote.

    Args:
        path: the folder.
        verify: compare the checksums of all files.

    Raises:
        StoreError: it is no published atlas.
        CorruptError: a file is missing, or is not what it was.
        VersionError: it was written by a newer atlasvi.

    Example:
        >>> publish(model, atlas, "my.atlasvi", overwrite=True)
        >>> open_compact("my.atlasvi").shape == atlas.shape
        True
    """
    folder = Path(path)
    found = read_index(folder, verify=verify)
    model = load(folder / MODEL)
    return CompactAtlas(folder, model, read_cells(folder, found["n_vars"]))


__all__ = ["CompactAtlas", "open_compact", "publish"]
