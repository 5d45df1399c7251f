"""Arguments as people give them: names, cells, devices; what is not supported is refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import CellsError, GenesError, OptionError

# What is drawn for another purpose begins so much further on; the kernels' seeds have 64 bits.
_MOST_SEEDS = 1 << 62

_INSTEAD = {
    "load_sparse_tensor": "counts are always sparse here",
    "datasplitter_kwargs": "use train_size, validation_size, shuffle_set_split and seed",
    "plan_config": "use plan_kwargs",
    "trainer_config": "use the arguments of train",
    "datamodule": "give the model an Atlas: atlasvi.open(path)",
    "dataloader": "give the model an Atlas: atlasvi.open(path)",
    "data_loader_kwargs": "use batch_size",
    "logger": "use model.history, or on_epoch=atlasvi.train.TensorBoard(folder)",
    "callbacks": "use on_epoch= and on_check=",
    "simple_progress_bar": "use enable_progress_bar",
    "n_samples_per_label": "use SCANVI(balance_labels=True)",
    "classifier_parameters": "use classifier_n_layers, classifier_n_hidden and classifier_dropout_rate",
    "use_permutation": "raise n_samples_overall: every draw is in a pair",
    "m_permutation": "raise n_samples_overall: every draw is in a pair",
    "change_fn": "decode rho with model.expression, and compute it from there",
    "m1_domain_fn": "decode rho with model.expression, and compute it from there",
    "importance_weighting_kwargs": "every cell of a group weighs the same",
    "subset_idx": "pass a view of the cells: adata=atlas[cells]",
    "strategy": "start the script with torchrun --nproc-per-node=2",
    "gradient_clip_val": "a loss that is not finite ends training; lower plan_kwargs={'lr': ...}",
    "mc_samples": "the mean is exact; give_mean=False is one draw",
    "prefix": "give each model a folder of its own",
    "save_anndata": "counts stay where they are; write them with anndata",
}


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed, naming them."""
    if value not in allowed:
        raise OptionError(f"{name} {value!r} is not supported; choose one of {', '.join(allowed)}")


def refuse(method: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments that scvi-tools has and we have not, naming our way."""
    for name in arguments:
        raise OptionError(f"{method}({name}=...) is not supported; {_INSTEAD.get(name, 'see its docstring')}")


def at_least_one(name: str, value: int) -> int:
    """Refuse what is no whole number or below 1, naming it."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} must be a whole number of at least 1, is {value!r}")
    return int(value)


def not_negative(name: str, value: float) -> float:
    """Refuse what is no number of at least 0, naming it."""
    if not isinstance(value, int | float | np.number) or not value >= 0:
        raise OptionError(f"{name} must be a number of at least 0, is {value!r}")
    return float(value)


def checked_seed(seed: int) -> int:
    """Refuse what no generator can start from."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < _MOST_SEEDS:
        raise OptionError(f"seed must be an integer of 0 or more and below 2^62, is {seed!r}")
    return int(seed)


def checked_library_size(library_size: float | str) -> float | None:
    """What rho is multiplied by; ``None`` for each cell's own."""
    if isinstance(library_size, str) and library_size == "latent":
        return None
    if not isinstance(library_size, int | float | np.number) or not 0 < library_size < np.inf:
        raise OptionError(f"library_size must be a number above 0 or 'latent', is {library_size!r}")
    return float(library_size)


def choose_device(accelerator: str, devices: int | str) -> torch.device:
    """The device to train on, as scvi-tools' ``accelerator`` and ``devices`` name it."""
    one_of("accelerator", accelerator, ("auto", "cpu", "gpu", "cuda"))
    if devices not in ("auto", 1, "1"):
        raise OptionError(
            f"devices={devices!r} is not supported; a process trains on one device: devices=1, and for "
            "several: torchrun --nproc-per-node=2 script.py"
        )
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise OptionError(f"accelerator={accelerator!r}, but torch finds no CUDA device; use 'cpu' or 'auto'")
    use_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")


def gene_positions(names: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    """Positions of some genes among the model's."""
    names = as_names(names)
    if not names:
        raise GenesError("no gene was asked for; name at least one, or pass None for all")
    where = {name: i for i, name in enumerate(known)}
    missing = [name for name in names if name not in where]
    if missing:
        near = difflib.get_close_matches(str(missing[0]), known, 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise GenesError(f"{len(missing)} genes are not the model's, the first {missing[0]!r}{hint}")
    return np.array([where[name] for name in names], np.int64)


def as_names(names: str | Sequence[str]) -> list[str]:
    """One name, or several, as a list."""
    return [names] if isinstance(names, str) else [str(name) for name in names]


def cell_positions(cells: Any, n_obs: int) -> NDArray[np.int64]:
    """Cells as a person names them (a slice, a mask, positions, from the end if negative) as positions."""
    chosen = np.arange(n_obs)[cells] if isinstance(cells, slice) else np.atleast_1d(np.asarray(cells))
    if not len(chosen) or (chosen.dtype == bool and not chosen.any()):
        raise CellsError(f"none of the {n_obs} cells were chosen; choose at least one")
    if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
        raise CellsError(
            f"cells are chosen by a slice, integers or a mask, not {chosen.dtype} {chosen.shape}"
        )
    if chosen.dtype == bool:
        if len(chosen) != n_obs:
            raise CellsError(
                f"a mask of {len(chosen)} cells was given for {n_obs}; it must have one entry each"
            )
        return np.flatnonzero(chosen)
    chosen = chosen.astype(np.int64)
    outside = chosen[(chosen < -n_obs) | (chosen >= n_obs)]
    if len(outside):
        raise CellsError(f"cell {outside[0]} was asked for but there are {n_obs}, from 0 to {n_obs - 1}")
    return np.where(chosen < 0, chosen + n_obs, chosen)
