"""One file a model: what it assumes, a config, a module, a thin public class. Here they are by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlasvi.errors import ModelError, OptionError

if TYPE_CHECKING:
    from atlasvi.models.data import Data

# Add a model: its line here, and in `atlasvi/__init__.py`.
_WHERE = {
    "SCVI": "atlasvi.models.scvi",
    "SCANVI": "atlasvi.models.scanvi",
    "LinearSCVI": "atlasvi.models.ldvae",
    "SCVAE": "atlasvi.models.scvae",
    "GMVAE": "atlasvi.models.gmvae",
    "DCA": "atlasvi.models.dca",
    "ACTINN": "atlasvi.models.actinn",
    "GaussianVAE": "atlasvi.models.vae",
    "PCA": "atlasvi.models.factor",
    "PPCA": "atlasvi.models.factor",
    "FactorAnalysis": "atlasvi.models.factor",
}


def by_name(name: str) -> Any:
    """The class of a model, whose name may be written in lower case.

    Raises:
        OptionError: there is none of that name.

    Example:
        >>> by_name("linearscvi").__name__
        'LinearSCVI'
    """
    for known, module in _WHERE.items():
        if name.lower() == known.lower():
            return getattr(importlib.import_module(module), known)
    raise OptionError(f"model {name!r} is not known; choose one of {', '.join(_WHERE).lower()}")


def class_of(path: Path) -> Any:
    """The class of the model that a folder holds.

    Raises:
        ModelError: the folder is not a model's.
    """
    from atlasvi.models.folder import read_description

    name = read_description(path).get("model")
    if name not in _WHERE:
        raise ModelError(f"{str(path)!r} is a {name}, which this atlasvi does not know; upgrade it")
    return by_name(name)


def load(path: str | Path, adata: Data | None = None) -> Any:
    """Read a model of whatever class that `save` wrote; no code of the folder is run.

    Args:
        path: the folder.
        adata: data to go with it.

    Raises:
        ModelError: the folder is not a model's.
        VersionError: it was written by a newer atlasvi.
    """
    return class_of(Path(path)).load(path, adata)


__all__ = ["by_name", "class_of", "load"]
