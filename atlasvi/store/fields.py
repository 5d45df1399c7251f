"""Which columns of obs a model uses, resolved once: category codes, covariates and genes matched by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.errors import GenesError, ObsError, OptionError
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    import anndata

    from atlasvi.store.atlas import Atlas

UNS_KEY = "atlasvi"
# Of a covariate: the square of one that is larger leaves float32, and the likelihood with it.
_LARGEST = 1e15
Column: TypeAlias = "pd.Categorical | pd.api.extensions.ExtensionArray | NDArray[Any]"


@dataclass(frozen=True, slots=True)
class Codes:
    """What a model needs to know of each cell of an atlas, as numbers.

    Category codes are kept in the smallest signed integer type that holds them; `stream.pack` widens
    those of a minibatch to int64.

    Args:
        batch_index: ``(n_obs,)`` integer.
        labels: ``(n_obs,)`` integer.
        cat_covs: ``(n_obs, n_cat)`` integer.
        cont_covs: ``(n_obs, n_cont)`` float32.
        size_factor: ``(n_obs,)`` float32, > 0, or ``None`` where none was registered.
        gene_columns: ``(G,)`` int64, column in the atlas of each gene of the model.
    """

    batch_index: NDArray[Any]
    labels: NDArray[Any]
    cat_covs: NDArray[Any]
    cont_covs: NDArray[np.float32]
    size_factor: NDArray[np.float32] | None
    gene_columns: NDArray[np.int64]


def register(
    atlas: Atlas,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    gene_mask: str | None = None,
) -> FieldMap:
    """Look at the data a model is about to be trained on, and say which columns and genes it uses.

    Levels are text; numbers become text the same way everywhere, so that 1, 1.0 and ``"1"`` are one
    level. The levels of a categorical keep their order and those that no cell has are left out; other
    columns are sorted.

    Args:
        atlas: the data; cells or genes selected in a view are the ones that count.
        layer: where the counts are; must be what the atlas was opened with.
        batch_key: column of obs with the batch.
        labels_key: column of obs with labels.
        size_factor_key: column of obs with a number > 0 per cell.
        categorical_covariate_keys: further columns with levels.
        continuous_covariate_keys: further columns with finite numbers.
        gene_mask: boolean column of var, such as ``"highly_variable"``, that chooses the genes.

    Raises:
        ObsError: a column is missing, has gaps, or has numbers that cannot be.
        GenesError: a gene name stands twice, or the mask is missing, not boolean or empty.
        CountsError: an entry is not a count (in up to 100,000 cells; the rest is checked when read).
        OptionError: another layer than the atlas has, or a text where a list of columns is meant.
    """
    if layer != atlas.layer:
        raise OptionError(
            f"layer={layer!r} was asked for but {atlas.name} was opened with layer={atlas.layer!r}; "
            f"pass layer={atlas.layer!r}, or open it again with the other"
        )
    atlas.check_counts()
    categorical = _key_list("categorical_covariate_keys", categorical_covariate_keys)
    continuous = _key_list("continuous_covariate_keys", continuous_covariate_keys)
    with_levels = dict.fromkeys(key for key in (batch_key, labels_key, *categorical) if key is not None)
    field_map = FieldMap(
        var_names=_choose_genes(atlas, gene_mask),
        layer=layer,
        batch_key=batch_key,
        batch_categories=_levels(atlas, batch_key),
        labels_key=labels_key,
        labels_categories=_levels(atlas, labels_key),
        size_factor_key=size_factor_key,
        categorical_covariate_keys=categorical,
        categorical_covariate_categories=tuple(_levels(atlas, key) for key in categorical),
        continuous_covariate_keys=continuous,
        gene_mask=gene_mask,
        number_keys=tuple(key for key in with_levels if _holds_numbers(atlas, key)),
    )
    _check_numbers(atlas, field_map)
    return field_map


def resolve(field_map: FieldMap, atlas: Atlas) -> Codes:
    """The codes of an atlas in the terms of a model: the one it was trained on, or new data.

    Genes are matched by name, in whatever order the atlas has them.

    Raises:
        ObsError: a column is missing or has gaps, a level that training never saw, or numbers that
            cannot be.
        GenesError: genes of the model that the atlas lacks or has twice.
    """
    n_obs = atlas.n_obs
    cat_covs = [
        _codes(atlas, key, levels)
        for key, levels in zip(
            field_map.categorical_covariate_keys, field_map.categorical_covariate_categories, strict=True
        )
    ]
    cont_covs = [_numbers(atlas, key) for key in field_map.continuous_covariate_keys]
    size_factor = field_map.size_factor_key
    return Codes(
        batch_index=_codes(atlas, field_map.batch_key, field_map.batch_categories),
        labels=_codes(atlas, field_map.labels_key, field_map.labels_categories),
        cat_covs=np.stack(cat_covs, axis=1) if cat_covs else np.zeros((n_obs, 0), np.int8),
        cont_covs=np.stack(cont_covs, axis=1) if cont_covs else np.zeros((n_obs, 0), np.float32),
        size_factor=None if size_factor is None else _numbers(atlas, size_factor, positive=True),
        gene_columns=match_genes(field_map.var_names, atlas),
    )


def match_genes(names: Sequence[str], atlas: Atlas) -> NDArray[np.int64]:
    """Column in the atlas of each gene.

    Args:
        names: of the model's genes.
        atlas: any data; its genes may come in any order and there may be more of them.

    Raises:
        GenesError: genes that the atlas lacks, or has twice.
    """
    columns = gene_positions(names, atlas.var_names.astype(object), atlas.name)
    missing = [names[i] for i in np.flatnonzero(columns < 0).tolist()]
    if missing:
        raise GenesError(
            f"{atlas.name} lacks {len(missing)} of the model's {len(names)} genes: {_some(missing)}; "
            "give data with all of them, under the same names"
        )
    return columns


def gene_positions(names: Sequence[str], var_names: Any, whose: str) -> NDArray[np.int64]:
    """Where each gene stands among the names of some data, or -1.

    Args:
        names: of the model's genes.
        var_names: of the data.
        whose: what the data are called.

    Raises:
        GenesError: genes of the model that stand there twice.
    """
    have, want = pd.Index(var_names, dtype=object), pd.Index(list(names), dtype=object)
    is_repeat = have.duplicated()
    twice = have[is_repeat].unique().intersection(want)
    if len(twice):
        raise GenesError(
            f"{whose} has {_some(twice)} more than once, so they cannot be matched by name; "
            "make gene names unique: adata.var_names_make_unique()"
        )
    # What is not found is the last of these.
    columns = np.append(np.flatnonzero(~is_repeat), -1)
    found: NDArray[np.int64] = columns[have[~is_repeat].get_indexer(want)]
    return found


def level_codes(atlas: Atlas, key: str | None) -> tuple[NDArray[Any], tuple[str, ...]]:
    """``(n_obs,)`` codes of a column of obs, and the levels its cells have; ``("0",)`` without a key.

    Raises:
        ObsError: the column is missing or has gaps.
    """
    levels = _levels(atlas, key)
    return _codes(atlas, key, levels), levels


def codes_of_known(atlas: Atlas, key: str | None, known: tuple[str, ...], otherwise: int) -> NDArray[Any]:
    """``(n_obs,)`` codes in the order of ``known``; ``otherwise`` of cells with another level, or with none.

    Nor need the atlas have the column.
    """
    dtype = np.min_scalar_type(-max(len(known), 1))
    if key is None or key not in atlas.obs_keys:
        return np.full(atlas.n_obs, otherwise, dtype)
    codes, levels = _with_gaps(atlas, key)
    code_of = {level: code for code, level in enumerate(known)}
    # The last is where the code -1 of a gap leads.
    translated = np.array([*(code_of.get(level, otherwise) for level in levels), otherwise], dtype)
    result: NDArray[Any] = translated[codes]
    return result


def uns_entry(field_map: FieldMap) -> str:
    """The registration as the text that stands in ``adata.uns["atlasvi"]``."""
    return field_map.to_json()


def from_uns(adata: anndata.AnnData) -> FieldMap | None:
    """The registration that `uns_entry` made, or ``None`` where there is none.

    Raises:
        OptionError: the entry is not what `uns_entry` writes.
    """
    text = adata.uns.get(UNS_KEY)
    if text is None:
        return None
    try:
        return FieldMap.from_json(str(text))
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"uns['{UNS_KEY}'] is not a registration of this atlasvi ({error}); run setup_anndata again"
        ) from error


def _choose_genes(atlas: Atlas, gene_mask: str | None) -> tuple[str, ...]:
    names = atlas.var_names.astype(object)
    if gene_mask is not None:
        if gene_mask not in atlas.var_keys:
            raise GenesError(
                f"var of {atlas.name} has no column {gene_mask!r}{_near(gene_mask, atlas.var_keys)}"
            )
        mask = np.asarray(atlas.var_column(gene_mask))
        if mask.dtype == object and all(isinstance(value, bool | np.bool_) for value in mask):
            mask = mask.astype(bool)
        if mask.dtype != bool:
            raise GenesError(
                f"var column {gene_mask!r} of {atlas.name} holds {mask.dtype}, not true or false; "
                "name a boolean column"
            )
        names = names[mask]
        if not len(names):
            raise GenesError(
                f"var column {gene_mask!r} of {atlas.name} chooses none of {atlas.n_vars} genes; "
                "choose at least one"
            )
    if not len(names):
        raise GenesError(f"{atlas.name} has no genes, as a view that chose none; choose at least one")
    index = pd.Index(names)
    if not index.is_unique:
        raise GenesError(
            f"{atlas.name} has {_some(index[index.duplicated()].unique())} more than once; "
            "make gene names unique: adata.var_names_make_unique()"
        )
    return tuple(str(name) for name in names)


def _levels(atlas: Atlas, key: str | None) -> tuple[str, ...]:
    """The levels that the cells have, as text, in the order of their codes."""
    if key is None:
        return ("0",)
    codes, levels = _factorize(atlas, key)
    used = np.zeros(len(levels), bool)
    used[codes] = True
    # Two levels that read the same (1 and "1" in one column) are one.
    return tuple(dict.fromkeys(level for level, is_used in zip(levels, used, strict=True) if is_used))


def _codes(atlas: Atlas, key: str | None, known: tuple[str, ...]) -> NDArray[Any]:
    """``(n_obs,)`` codes in the order of ``known``, in the smallest signed integer type."""
    dtype = np.min_scalar_type(-max(len(known), 1))
    if key is None:
        return np.broadcast_to(np.zeros((), dtype), atlas.n_obs)  # no byte a cell
    codes, levels = _factorize(atlas, key)
    code_of = {level: code for code, level in enumerate(known)}
    translated = np.array([code_of.get(level, -1) for level in levels], dtype)
    result: NDArray[Any] = translated[codes]
    unseen = np.flatnonzero(result < 0)
    if len(unseen):
        names = list(dict.fromkeys(levels[code] for code in np.unique(codes[unseen])))
        raise ObsError(
            f"obs column {key!r} of {atlas.name} has {_some(names)} at {len(unseen)} cells, which training "
            f"never saw; it knows {_some(known, 10)}. Leave these cells out, rename the level to the one it "
            "is, or train with it"
        )
    return result


def _factorize(atlas: Atlas, key: str) -> tuple[NDArray[Any], list[str]]:
    """``(n_obs,)`` codes without gaps and the levels they stand for, as text."""
    codes, levels = _with_gaps(atlas, key)
    _refuse_gaps(atlas, key, np.flatnonzero(codes < 0))
    return codes, levels


def _with_gaps(atlas: Atlas, key: str) -> tuple[NDArray[Any], list[str]]:
    """As `_factorize`, -1 where a cell has no value."""
    column = _column(atlas, key)
    if isinstance(column, pd.Categorical):
        codes, values = column.codes, column.categories
    elif isinstance(column, np.ndarray) and column.dtype.kind not in "OT":
        codes, values = pd.factorize(column, sort=True)
    else:
        # A column may mix text and numbers, which do not sort: sort what they read as.
        codes, values = pd.factorize(np.asarray(column, dtype=object))
        order = sorted(range(len(values)), key=lambda at: as_level(values[at]))
        rank = np.empty(len(values) + 1, np.int64)
        rank[order], rank[-1] = np.arange(len(values)), -1
        codes, values = rank[codes], values[order]
    return codes, [as_level(value) for value in values]


def as_level(value: Any) -> str:
    """A value of a categorical column as text: 1, 1.0 and ``"1"`` are the same level.

    Example:
        >>> as_level(1), as_level(1.0), as_level(0.5), as_level(True), as_level("a")
        ('1', '1', '0.5', 'True', 'a')
    """
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    if isinstance(value, bytes):
        return value.decode()
    return str(value)


def are_numbers(values: Any) -> bool:
    """Whether levels are numbers, or true and false, rather than text."""
    return pd.api.types.infer_dtype(values) in ("integer", "floating", "mixed-integer-float", "boolean")


def _holds_numbers(atlas: Atlas, key: str) -> bool:
    column = _column(atlas, key)
    return are_numbers(column.categories if isinstance(column, pd.Categorical) else column)


def _numbers(atlas: Atlas, key: str, *, positive: bool = False) -> NDArray[np.float32]:
    """``(n_obs,)`` float32, checked."""
    column = _column(atlas, key)
    if not isinstance(column, np.ndarray):
        is_gap = np.asarray(pd.isna(column))
        column = np.asarray(column, dtype=object)
        column[is_gap] = np.nan
    if column.dtype.kind not in "fiub":
        try:
            column = column.astype(np.float64)
        except (ValueError, TypeError) as error:
            raise ObsError(f"obs column {key!r} of {atlas.name} must hold numbers: {error}") from error
    with np.errstate(over="ignore"):
        numbers: NDArray[np.float32] = column.astype(np.float32)
    wrong = ~(np.abs(numbers) <= _LARGEST)
    if positive:
        wrong |= ~(numbers > 0)
    at = np.flatnonzero(wrong)
    if len(at):
        need = f"a number {'> 0 and at most' if positive else 'between -1e+15 and'} {_LARGEST:g}"
        raise ObsError(
            f"obs column {key!r} of {atlas.name} is {column[at[0]]} at cell {str(atlas.obs_names[at[0]])!r} "
            f"({len(at)} such cells); every cell needs {need}. Correct them or leave them out"
        )
    return numbers


def _check_numbers(atlas: Atlas, field_map: FieldMap) -> None:
    for key in field_map.continuous_covariate_keys:
        _numbers(atlas, key)
    if field_map.size_factor_key is not None:
        _numbers(atlas, field_map.size_factor_key, positive=True)


def _column(atlas: Atlas, key: str) -> Column:
    keys = atlas.obs_keys
    if key not in keys:
        raise ObsError(f"obs of {atlas.name} has no column {key!r}{_near(key, keys)}")
    return atlas.obs_column(key)


def _refuse_gaps(atlas: Atlas, key: str, at: NDArray[np.int64]) -> None:
    if len(at):
        raise ObsError(
            f"obs column {key!r} of {atlas.name} has no value at {len(at)} cells, the first "
            f"{str(atlas.obs_names[at[0]])!r}; give them one or leave them out"
        )


def _key_list(name: str, keys: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(keys, str):
        raise OptionError(f"{name}={keys!r} must be a list of columns; pass [{keys!r}]")
    return tuple(keys or ())


def _near(key: str, keys: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, list(keys), n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; it has {_some(keys, 10)}" if len(keys) else "; it has no columns at all"


def _some(names: Sequence[str] | pd.Index, at_most: int = 5) -> str:
    shown = ", ".join(repr(str(name)) for name in list(names[:at_most]))
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"


__all__ = [
    "UNS_KEY",
    "Codes",
    "are_numbers",
    "as_level",
    "codes_of_known",
    "from_uns",
    "gene_positions",
    "level_codes",
    "match_genes",
    "register",
    "resolve",
    "uns_entry",
]
