"""atlasvi: probabilistic models of single-cell counts, for atlases that do not fit in memory."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from atlasvi.memory import use_one_heap as _use_one_heap

if "torch" not in sys.modules:
    # As atlasvi_kernels does, which is imported later: how long OpenMP's threads spin while they wait.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# Before any thread has a heap of its own.
_use_one_heap()

if TYPE_CHECKING:
    from atlasvi.errors import AtlasviError
    from atlasvi.models.actinn import ACTINN
    from atlasvi.models.compact import open_compact, publish
    from atlasvi.models.dca import DCA
    from atlasvi.models.factor import PCA, PPCA, FactorAnalysis
    from atlasvi.models.gmvae import GMVAE
    from atlasvi.models.ldvae import LinearSCVI
    from atlasvi.models.scanvi import SCANVI
    from atlasvi.models.scvae import SCVAE
    from atlasvi.models.scvi import SCVI
    from atlasvi.models.vae import GaussianVAE
    from atlasvi.scorecard.making import evaluate
    from atlasvi.simulate import Simulation
    from atlasvi.store.atlas import Atlas, open
    from atlasvi.store.ingest import ingest

__version__ = "0.1.0"

__all__ = [
    "ACTINN",
    "DCA",
    "GMVAE",
    "PCA",
    "PPCA",
    "SCANVI",
    "SCVAE",
    "SCVI",
    "Atlas",
    "AtlasviError",
    "FactorAnalysis",
    "GaussianVAE",
    "LinearSCVI",
    "Simulation",
    "evaluate",
    "ingest",
    "open",
    "open_compact",
    "publish",
]

_WHERE = {
    "SCANVI": "atlasvi.models.scanvi",
    "GMVAE": "atlasvi.models.gmvae",
    "SCVAE": "atlasvi.models.scvae",
    "SCVI": "atlasvi.models.scvi",
    "ACTINN": "atlasvi.models.actinn",
    "DCA": "atlasvi.models.dca",
    "PCA": "atlasvi.models.factor",
    "PPCA": "atlasvi.models.factor",
    "FactorAnalysis": "atlasvi.models.factor",
    "GaussianVAE": "atlasvi.models.vae",
    "Atlas": "atlasvi.store.atlas",
    "LinearSCVI": "atlasvi.models.ldvae",
    "AtlasviError": "atlasvi.errors",
    "Simulation": "atlasvi.simulate",
    "evaluate": "atlasvi.scorecard.making",
    "ingest": "atlasvi.store.ingest",
    "open": "atlasvi.store.atlas",
    "open_compact": "atlasvi.models.compact",
    "publish": "atlasvi.models.compact",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: ``atlasvi --help`` needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'atlasvi' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
