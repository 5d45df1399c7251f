"""What all tests share: seeds, the folder of real data, a small atlas, memory that is not zero by luck."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import atlasvi  # noqa: F401 - first: it tells OpenMP not to spin before torch starts it

# isort: split
import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

_M_PERTURB = -6  # of malloc.h
# Files that take a minute and more, the longest first.
_LONG = (
    "test_memory.py", "test_docs.py", "test_cli.py", "test_ranks.py", "test_triton.py", "test_scanvi.py",
    "test_questions.py", "test_decode.py", "test_ingest_round_trip.py", "test_marginal.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files begin first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers for every test, in whatever order they run."""
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few cells gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def client():
    """Of a Dask cluster of two processes on this machine."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL
        ) as cluster,
        distributed.Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture(autouse=True, scope="session")
def heeded_ctrl_c():
    """Processes that tests start heed SIGINT, which a shell's background jobs are started to ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def poisoned_malloc():
    """Fresh memory holds 0xfe bytes (huge numbers) instead of what lay there before, where glibc can do it.

    This reaches ``np.empty`` in compiled code too, which no patch of a Python name does; not the blocks
    of about a kilobyte and less, which malloc hands out again from a list of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_PERTURB, 0x01)
    yield
    if mallopt is not None:
        mallopt(_M_PERTURB, 0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """`torch.empty` gives NaN, or the largest integer: an output that is not written is then seen."""

    def poison(make):
        def poisoned(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type != "meta" and out.layout == torch.strided and out.dtype != torch.bool:
                with torch.no_grad():
                    is_float = out.is_floating_point() or out.is_complex()
                    out.fill_(float("nan") if is_float else torch.iinfo(out.dtype).max)
            return out

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is not."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ATLASVI_TEST_DATA", default))
    if not (folder / "INDEX.md").is_file():
        pytest.skip(f"no real data at {folder}; set ATLASVI_TEST_DATA to the folder that has INDEX.md")
    return folder


@dataclass(frozen=True)
class Said:
    """What a command came to, as `subprocess.CompletedProcess` names it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command_here(monkeypatch, capsys):
    """``command_here(*words, cwd=None)``: the command by its own function; a process each takes seconds."""
    from atlasvi.cli import main

    def run(*words, cwd=None) -> Said:
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["atlasvi", *map(str, words)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Said(int(end.value.code or 0), *capsys.readouterr())

    return run


def make_adata(n_obs: int = 300, n_vars: int = 60, seed: int = 0) -> anndata.AnnData:
    """Negative binomial counts of three groups of cells in two batches, with covariates."""
    rng = np.random.default_rng(seed)
    group, batch = rng.integers(0, 3, n_obs), rng.integers(0, 2, n_obs)
    profile = rng.gamma(0.5, 1.0, (3, n_vars)) * np.exp(rng.normal(0, 0.3, (2, 1, n_vars)))[batch[0]]
    mu = profile[group] * rng.lognormal(0, 0.4, (n_obs, 1)) * np.where(batch, 1.5, 1.0)[:, None]
    counts = rng.negative_binomial(2.0, 2.0 / (2.0 + mu)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(batch, ["b1", "b2"]),
            "cell_type": pd.Categorical.from_codes(group, ["T", "B", "NK"]),
            "donor": pd.Categorical.from_codes(rng.integers(0, 4, n_obs), ["d0", "d1", "d2", "d3"]),
            "percent_mito": rng.uniform(0, 10, n_obs),
            "age": rng.integers(20, 80, n_obs),
            "size_factor": rng.lognormal(0, 0.3, n_obs),
        },
        index=[f"cell-{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame(
        {"highly_variable": np.arange(n_vars) % 3 == 0}, index=[f"gene-{g}" for g in range(n_vars)]
    )
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture
def adata() -> anndata.AnnData:
    """300 cells x 60 genes with ``batch``, ``cell_type``, ``donor``, ``percent_mito``, ``size_factor``."""
    return make_adata()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory) -> Path:
    """`adata`, ingested to a store on disk. Shared by all tests: not to be written to."""
    from atlasvi.store.ingest import ingest

    path = tmp_path_factory.mktemp("atlas") / "small.zarr"
    ingest(make_adata(), path)
    return path


@pytest.fixture
def small_atlas(small_store):
    """`adata` as an `Atlas` on disk."""
    from atlasvi.store import atlas

    with atlas.open(small_store) as opened:
        yield opened
