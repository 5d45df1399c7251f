"""What the documentation shows works: its Python blocks run, examples in docstrings give what they say."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import anndata
import atlasvi_kernels
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import atlasvi
from atlasvi.models.base import CountModel
from atlasvi.models.core import Model
from tests import pages

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def simulated(var_names: list[str]) -> anndata.AnnData:
    """240 cells of two types and two donors, negative binomial."""
    rng = np.random.default_rng(0)
    kind, donor = rng.integers(0, 2, 240), rng.integers(0, 2, 240)
    mu = rng.gamma(1.0, 2.0, (2, len(var_names)))[kind] * np.where(donor, 1.5, 1.0)[:, None]
    obs = {
        "donor": pd.Categorical.from_codes(donor, ["d0", "d1"]),
        "batch": pd.Categorical.from_codes(donor, ["b0", "b1"]),
        "cell_type": pd.Categorical.from_codes(kind, ["T", "B"]),
    }
    return anndata.AnnData(
        sp.csr_matrix(rng.negative_binomial(2.0, 2.0 / (2.0 + mu)).astype(np.float32)),
        obs=pd.DataFrame(obs, index=[f"cell-{i}" for i in range(240)]),
        var=pd.DataFrame(index=var_names),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the pages call pbmc: counts with CD3E and MS4A1, columns donor and cell_type; and a model."""
    folder = tmp_path_factory.mktemp("docs")
    names = ["CD3E", "MS4A1", *(f"gene-{g}" for g in range(28))]
    simulated(names).write_h5ad(folder / "pbmc.h5ad")
    atlasvi.ingest(folder / "pbmc.h5ad", folder / "pbmc.zarr")
    atlas = atlasvi.open(folder / "pbmc.zarr")
    atlasvi.SCVI.setup_anndata(atlas, batch_key="donor")
    model = atlasvi.SCVI(atlas)
    model.train(max_epochs=1, enable_progress_bar=False)
    model.save(folder / "pbmc.model")
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if pages.blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
@pytest.mark.filterwarnings("default")  # a page may show what warns
def test_the_blocks_of_a_page_run(page, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pbmc.h5ad").write_bytes((trained / "pbmc.h5ad").read_bytes())
    if page.name != "README.md":  # which makes them itself
        for name in ("pbmc.zarr", "pbmc.model"):
            (tmp_path / name).symlink_to(trained / name)
    for block, printed in pages.run(page):
        if block.said is not None:
            assert pages.form(printed) == pages.form(block.said)
    for name in pages.pictures(page):
        assert (tmp_path / name).is_file()


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_site_has_every_page():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_tables_of_the_performance_page_stand_on_the_pages_that_it_links_to():
    text = (DOCS / "performance.md").read_text()
    linked = set(re.findall(r"\]\((\S+?\.md)", text))
    there = {line for name in linked for line in (DOCS / name).read_text().splitlines()}
    rows = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    assert rows
    assert [row for row in rows if row not in there] == []


def referenced() -> list[str]:
    """Dotted names that the reference documents, in order, each as often as it stands there."""
    return [name for page in sorted((DOCS / "api").glob("*.md"))
            for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]  # fmt: skip


def test_the_reference_has_every_public_name_once():
    there = [pkgutil.resolve_name(name) for name in referenced()]
    for package in (atlasvi, atlasvi_kernels):
        for name in package.__all__:
            public = getattr(package, name)
            assert sum(each is public for each in there) == 1, name


def test_the_reference_has_every_method_of_models_once():
    methods = [name for name in dir(CountModel) if name[0] != "_" and name not in Model.__annotations__]
    there = [name.removeprefix("atlasvi.models.base.CountModel.") for name in referenced()]
    assert {name: there.count(name) for name in methods} == dict.fromkeys(methods, 1)


@pytest.mark.parametrize("name", referenced())
def test_what_the_reference_names_is_there(name):
    assert pkgutil.resolve_name(name) is not None


def test_commands_of_the_pages_exist(monkeypatch):
    """Every option that a page shows for a command is one that the command has."""
    shown: dict[str, set[str]] = {}
    for page in PAGES:
        for command, rest in re.findall(r"^atlasvi (\w+) (.*)$", page.read_text(), re.M):
            shown.setdefault(command, set()).update(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest))
    assert shown
    for command, options in shown.items():
        done = subprocess.run(
            [sys.executable, "-m", "atlasvi.cli", command, "--help"], capture_output=True, text=True,
            env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PATH": ""}, check=True,
        )  # fmt: skip
        for option in options:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.stdout), f"{command} has no {option}"


def modules() -> list[str]:
    names = []
    for package in (atlasvi, atlasvi_kernels):
        names.append(package.__name__)
        names += [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [name for name in names if ">>>" in inspect.getsource(importlib.import_module(name))]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What examples of methods may speak of: ``atlas``, ``model`` and ``SCVI``."""
    path = tmp_path_factory.mktemp("examples") / "atlas.zarr"
    atlasvi.ingest(simulated([f"G{g:04d}" for g in range(30)]), path)
    atlas = atlasvi.open(path)
    atlasvi.SCVI.setup_anndata(atlas, batch_key="batch")
    model = atlasvi.SCVI(atlas, n_latent=5)
    model.train(max_epochs=1, enable_progress_bar=False)
    return {"atlas": atlas, "model": model, "SCVI": atlasvi.SCVI, "np": np}


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings_give_what_they_say(name, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    for test in finder.find(module, name, globs={**known, **vars(module)}):
        runner.run(test, out=said.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize(
    ("package", "name"), [(p, name) for p in (atlasvi, atlasvi_kernels) for name in p.__all__],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_every_public_name_has_a_docstring_with_an_example(package, name):
    doc = inspect.getdoc(getattr(package, name)) or ""
    assert doc and ">>>" in doc
