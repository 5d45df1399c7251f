"""Query mapping (scArches, Lotfollahi et al. 2022, Nature Biotechnology 40, 121): new batches for a model.

Each batch of the query that the reference does not know gets a row of weight in every layer that sees the
batch; these rows are trained on the query, and the rest stays what it was. A row begins as the mean of the
rows of the batches there are, so that a new batch is decoded like an average one.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from atlasvi.errors import GenesError, ModelError, OptionError
from atlasvi.models import load
from atlasvi.models.data import library_moments
from atlasvi.models.frozen import Freeze
from atlasvi.nn.layers import InputLinear
from atlasvi.store.atlas import as_atlas
from atlasvi.store.fields import gene_positions, level_codes
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    import anndata

    from atlasvi.models.data import Data

_FEW_GENES = 0.8


def map_query(cls: Any, adata: Data, reference: Any, freeze: Freeze) -> Any:
    """A model of the query: the reference's weights, with rows for the batches that are new.

    Args:
        cls: class of the model.
        adata: the query; it need not have been set up.
        reference: a trained model, or its folder.
        freeze: what is not trained.

    Raises:
        ModelError: the reference is of another class.
        NotTrainedError: it is not trained.
        GenesError, ObsError: genes or columns that the query lacks.
    """
    if isinstance(reference, str | Path):
        reference = load(reference)
    if type(reference) is not cls:
        raise ModelError(
            f"the reference is a {type(reference).__name__}, not a {cls.__name__}; use that class"
        )
    reference._must_be_trained()
    fields: FieldMap = reference.fields
    atlas = as_atlas(adata, layer=fields.layer)
    new = ()
    if fields.batch_key is not None:
        levels = level_codes(atlas, fields.batch_key)[1]
        new = tuple(level for level in levels if level not in fields.batch_categories)
    fields = replace(fields, batch_categories=(*fields.batch_categories, *new))
    # Penalties are on the reference's batches, and what they move is frozen.
    model = cls.without_data(replace(reference.config, adversary=0.0, mmd=0.0), fields)
    model.atlas, model._codes = model._data(atlas)
    n_batch = reference.fields.n_batch
    _copy(reference.module, model.module, n_batch, len(new))
    if model.module.library_is_latent:
        moments = library_moments(model.atlas, model._codes, fields.n_batch)
        for name, values in (("library_log_mean", moments.log_mean), ("library_log_var", moments.log_var)):
            getattr(model.module, name)[n_batch:] = torch.tensor(values)[n_batch:]
    model._freeze = replace(freeze, n_batch=n_batch)
    # A decay would move the frozen rows that lie in one parameter with the new ones.
    model.plan = replace(reference.plan, weight_decay=0.0)
    model.origin = f"of a reference, with {len(new)} new batches"
    return model


def _copy(old: nn.Module, new: nn.Module, n_batch: int, n_new: int) -> None:
    """The old weights, and for rows of new batches the mean of the old batches' rows."""
    state, theirs = new.state_dict(), old.state_dict()
    for name, value in state.items():
        if name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])
    layers = dict(old.named_modules())
    for name, layer in new.named_modules():
        before = layers[name]
        if isinstance(layer, InputLinear) and isinstance(before, InputLinear) and layer.n_sees_batch:
            _copy_rows(before, layer, n_batch, n_new)
    if "log_theta" in state and state["log_theta"].shape != theirs["log_theta"].shape:
        state["log_theta"][:n_batch] = theirs["log_theta"]
        state["log_theta"][n_batch:] = theirs["log_theta"].mean(0)
    for name in ("library_log_mean", "library_log_var"):
        if name in theirs:
            state[name][:n_batch] = theirs[name]


def _copy_rows(old: InputLinear, new: InputLinear, n_batch: int, n_new: int) -> None:
    assert new.covariate_weight is not None
    rows, first = new.covariate_weight.data.zero_(), new.n_continuous
    if old.covariate_weight is None:
        return
    # One batch says nothing and had no row: that is a row of zeros.
    n_old = n_batch if old.n_sees_batch else 0
    continuous, batches, rest = old.covariate_weight.data.tensor_split([first, first + n_old])
    rows[:first], rows[first + n_batch + n_new :] = continuous, rest
    if n_old:
        rows[first : first + n_old] = batches
        rows[first + n_old : first + n_old + n_new] = batches.mean(0)


def prepare_query(adata: anndata.AnnData, reference: Any) -> anndata.AnnData:
    """The query with the reference's genes in their order, those that it lacks as zeros.

    Args:
        adata: counts by cells and genes, in memory. What there is of cells is kept, and uns.
        reference: a model, or its folder.

    Raises:
        GenesError: no gene is shared, or one stands twice.
        OptionError: counts in ``raw``, or that are not in memory.
    """
    import anndata
    import scipy.sparse as sp

    _must_be_in_memory(adata)
    if isinstance(reference, str | Path):
        reference = load(reference)
    names = reference.fields.var_names
    if reference.fields.layer == "raw":
        raise OptionError("the reference takes counts from raw, which cannot be filled; put them into X")
    at = gene_positions(names, adata.var_names, "the query")
    share = float((at >= 0).mean())
    if share == 0:
        raise GenesError(
            f"the query has none of the reference's {len(names)} genes, the first {names[0]!r}; give both "
            "the same kind of names"
        )
    if share < _FEW_GENES:
        warnings.warn(
            f"the query has {share:.0%} of the reference's genes; the others are taken for zero",
            UserWarning, stacklevel=3,
        )  # fmt: skip
    # A product with this matrix puts each gene into its place.
    here = np.flatnonzero(at >= 0)
    place = sp.csr_matrix(
        (np.ones(len(here), np.float32), (at[here], here)), shape=(adata.n_vars, len(names))
    )

    def moved(matrix: Any) -> Any:
        if matrix is None:
            return None
        counts = sp.csr_matrix(matrix)
        return (counts @ place.astype(counts.dtype)).tocsr()

    var = adata.var.iloc[at[here]].reindex(list(names))
    layers = {key: moved(value) for key, value in adata.layers.items()}
    obsm, obsp = ({key: value.copy() for key, value in part.items()} for part in (adata.obsm, adata.obsp))
    return anndata.AnnData(
        moved(adata.X), adata.obs.copy(), var, adata.uns.copy(), layers=layers, obsm=obsm, obsp=obsp
    )


def _must_be_in_memory(adata: Any) -> None:
    import anndata
    import scipy.sparse as sp

    if isinstance(adata, anndata.AnnData):
        matrices = [adata.X, *adata.layers.values()]
        if all(x is None or isinstance(x, np.ndarray) or sp.issparse(x) for x in matrices):
            return
    raise OptionError(
        f"prepare_query_anndata takes an AnnData in memory, and was given a {type(adata).__name__} that is "
        "not; pass query.to_memory(), or atlas.to_anndata() of an Atlas; a query that has all genes of the "
        "reference needs no preparing: give it to load_query_data"
    )


__all__ = ["map_query", "prepare_query"]
