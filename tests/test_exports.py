"""What the distribution promises: names, packages, types, version."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import atlasvi
import atlasvi_kernels

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def as_ruff_sorts(name):
    """Constants, then classes, then the rest: RUF022."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def test_all_is_sorted_and_each_name_resolves():
    for package in (atlasvi, atlasvi_kernels):
        assert package.__all__ == sorted(package.__all__, key=as_ruff_sorts)
        assert all(getattr(package, name) is not None for name in package.__all__)


def test_dir_shows_what_there_is():
    assert set(atlasvi.__all__) <= set(dir(atlasvi))


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(AttributeError, match="SCVI"):
        atlasvi.scVI  # noqa: B018


def test_the_names_are_the_things_and_not_copies():
    from atlasvi.models.scvi import SCVI
    from atlasvi.store.ingest import ingest

    assert atlasvi.SCVI is SCVI
    assert atlasvi.ingest is ingest


def test_every_folder_with_python_in_it_is_a_package_of_the_distribution():
    tools = PROJECT["tool"]["setuptools"]
    places = {"atlasvi": "atlasvi", **{folder: name for name, folder in tools["package-dir"].items()}}
    there = {
        ".".join([places[top], *path.relative_to(ROOT / top).parts])
        for top in places
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert sorted(there) == sorted(tools["packages"])
    assert "kernels" not in tools["packages"]


@pytest.mark.parametrize("folder", ["atlasvi", "kernels"])
def test_types_are_promised_and_shipped(folder):
    assert (ROOT / folder / "py.typed").is_file()
    name = "atlasvi" if folder == "atlasvi" else "atlasvi_kernels"
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][name]


def test_the_version_is_the_distributions():
    assert atlasvi.__version__ == PROJECT["project"]["version"]
    assert atlasvi.__version__ == importlib.metadata.version("atlasvi")
