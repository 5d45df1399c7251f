"""What comes out of differential expression beside the table: calibration, charts, files of the command."""

import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

import atlasvi
from atlasvi import plots
from atlasvi.errors import CellsError, ObsError, OptionError
from tests.conftest import make_adata


@pytest.fixture(scope="module")
def model():
    adata = make_adata(400, 60)
    atlasvi.SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = atlasvi.SCVI(adata, n_latent=4, n_hidden=16)
    model.train(12, batch_size=64, schedule="scvi-tools", plan_kwargs={"lr": 0.02}, enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def found(model):
    return model.differential_expression(groupby="cell_type", silent=True, bf_threshold=0.7)


# --- a group against itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, {"mode": "change", "delta": 1.0}, {"estimator": "paper", "n_draws": 30}]
)
def test_a_group_does_not_differ_from_itself(model, arguments):
    halves = model.calibration(
        groupby="cell_type", group="T", n_splits=6, n_cells=40, n_samples_overall=800, **arguments
    )
    assert list(halves.columns) == ["n_called", "share_called", "largest", "gene"]
    assert len(halves) == 6 and halves["n_called"].sum() == 0
    assert halves["largest"].nunique() > 3  # each split is another
    again = model.calibration(
        groupby="cell_type", group="T", n_splits=2, n_cells=40, n_samples_overall=800, **arguments
    )
    pd.testing.assert_frame_equal(again, halves.iloc[:2])


def test_calibration_sees_what_is_there(model):
    """Of all cells, halves differ by chance; with a threshold that noise passes, genes are called."""
    halves = model.calibration(idx=np.arange(400), n_splits=2, n_cells=5, bf_threshold=1e-3)
    assert halves["n_called"].min() > 30
    assert (halves["share_called"] == halves["n_called"] / 60).all()


def test_calibration_refuses_what_cannot_be(model):
    with pytest.raises(CellsError, match="too few to compare 100 of them with 100 others"):
        model.calibration(idx=np.arange(150))
    with pytest.raises(OptionError, match="name one group"):
        model.calibration(groupby="cell_type")
    with pytest.raises(ObsError, match="no level 'TT'"):
        model.calibration(groupby="cell_type", group="TT")
    with pytest.raises(OptionError, match="n_splits must be"):
        model.calibration(groupby="cell_type", group="T", n_splits=0)


# --- charts -----------------------------------------------------------------------------------------


def parsed(svg):
    return ET.fromstring(svg)


def texts(svg):
    return ["".join(element.itertext()) for element in parsed(svg).iter() if element.tag.endswith("text")]


def test_a_volcano_names_the_genes_called(model, found):
    one = found[found["comparison"] == "T vs Rest"]
    called = one[one["is_de_bf_0.7"]]
    assert 2 < len(called) < 60
    svg = plots.volcano(found, comparison="T vs Rest", n_names=2)
    names = [text for text in texts(svg) if text.startswith("gene-")]
    for side in (called["scale1"] > called["scale2"], called["scale1"] < called["scale2"]):
        best = called[side]["bayes_factor"].abs().nlargest(2).index
        assert set(best) <= set(names)
    assert f"T vs Rest: {len(called)} of 60 genes called" in texts(svg)
    change = model.differential_expression(None, "cell_type", "T", "B", mode="change", silent=True)
    assert "probability of a change" in texts(plots.volcano(change))


def test_every_gene_is_a_dot(found):
    one = found[found["comparison"] == "T vs Rest"]
    svg = plots.volcano(one)
    assert sum(path.get("d").count("M") for path in parsed(svg).iter("path")) == 60


def test_a_heat_map_shows_the_best_genes_of_each_group(found):
    svg = plots.marker_heat_map(found, n_genes=2)
    shown = texts(svg)
    for group, part in found[found["scale1"] > found["scale2"]].groupby("group1"):
        assert group in shown
        # Of genes whose factors are equal, as at the bound, any may be shown.
        best = part[part["bayes_factor"] >= part["bayes_factor"].nlargest(2).min()]
        assert len(set(best.index) & set(shown)) >= 2


def test_charts_refuse_what_they_cannot_show(model, found):
    with pytest.raises(OptionError, match="3 comparisons"):
        plots.volcano(found)
    with pytest.raises(OptionError, match="'T vs X' is not in the table"):
        plots.volcano(found, comparison="T vs X")
    cells = model.differential_expression(idx1=[1, 2], idx2=[3, 4], silent=True)
    assert plots.volcano(cells).startswith("<svg")
    with pytest.raises(OptionError, match="groups by name"):
        plots.marker_heat_map(cells)
    with pytest.raises(OptionError, match="not a chart"):
        plots.as_file("<p>")


def test_a_chart_is_a_file_of_its_own(found):
    text = plots.as_file(plots.marker_heat_map(found))
    root = parsed(text)
    assert root.get("xmlns", root.tag).endswith("svg") and "Mean rho of the best genes" in text


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("de")
    model.atlas  # noqa: B018 - the same cells, from a store
    with pytest.warns(UserWarning):
        atlasvi.ingest(make_adata(400, 60), folder / "atlas.zarr")
    model.save(folder / "model")
    return folder


@pytest.fixture
def command(places, command_here):
    def run(*arguments, of=("model", "atlas.zarr")):
        return command_here("de", *of, *arguments, cwd=places)

    return run


@pytest.mark.parametrize("names", [("--group", "--versus"), ("--group1", "--group2")])
def test_the_command_writes_what_the_method_says(model, places, command, names):
    one, two = names
    done = command(
        "-o", "t.csv.gz", "--groupby", "cell_type", one, "T", two, "B", "--overwrite",
        "--volcano", "v.svg", "--n-samples", "600", "--seed", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(places / "t.csv.gz", index_col="gene")
    own = model.differential_expression(
        places / "atlas.zarr", "cell_type", "T", "B", n_samples_overall=600, seed=3, silent=True
    )
    assert list(table.columns) == list(own.columns)
    np.testing.assert_allclose(table.loc[own.index, "proba_m1"], own["proba_m1"], atol=4e-3)
    assert "<svg" in (places / "v.svg").read_text()
    assert "of 60 genes called" in done.stdout


def test_the_command_compares_groups_of_a_published_atlas(model, places, command):
    atlasvi.publish(model, places / "atlas.zarr", places / "my.atlasvi", dtype="float32", overwrite=True)
    how = ("--groupby", "cell_type", "--group", "T", "--n-samples", "600", "--overwrite")
    done = command("-o", "p.csv", *how, of=["my.atlasvi"])
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(places / "p.csv", index_col="gene")
    own = model.differential_expression(
        places / "atlas.zarr", "cell_type", "T", n_samples_overall=600, all_stats=False, silent=True
    )
    np.testing.assert_allclose(table.loc[own.index, "proba_m1"], own["proba_m1"], atol=4e-3)
    for of, says in ((["my.atlasvi", "atlas.zarr"], "needs no counts"), (["model"], "name the atlas")):
        refused = command("-o", "x.csv", *how, of=of)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and says in refused.stderr


def test_what_cannot_be_drawn_is_refused(found):
    one = found[found["comparison"] == "T vs Rest"]
    for draw, said in (
        (lambda: plots.volcano(one[:0]), "no genes"),
        (lambda: plots.volcano(one.assign(bayes_factor=np.inf)), "of gene 'gene-.*' is not finite"),
        (lambda: plots.marker_heat_map(found, n_genes=0), "n_genes=0"),
        (lambda: plots.marker_heat_map(found.assign(scale1=0.0)), "no gene of 60 is higher"),
        (lambda: plots.marker_heat_map(found[:0]), "no gene of 0"),
    ):
        with pytest.raises(OptionError, match=said):
            draw()


def test_a_chart_of_any_name_is_a_file(found):
    odd = found[found["comparison"] == "T vs Rest"].assign(comparison="T\n\x07cells vs Rest")
    assert any("cells vs Rest: " in text for text in texts(plots.as_file(plots.volcano(odd))))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "x.txt", "--groupby", "cell_type"], "names no table"),
        (["-o", "x.csv"], "nobody is compared"),
        (["-o", "no/x.csv", "--groupby", "cell_type"], "there is no folder"),
        (["-o", "x.csv", "--groupby", "cell_type", "--group", "TT"], "no level 'TT'"),
        (["-o", "x.csv", "--groupby", "cell_type", "--volcano", "model"], "end it in .svg"),
        (["-o", "x.csv", "--groupby", "cell_type", "--volcano", "x.csv"], "end it in .svg"),
        (
            ["-o", "x.csv", "--groupby", "cell_type", "--volcano", "x.svg", "--heat-map", "x.svg"],
            "name a file for each",
        ),
        (["-o", "x.csv", "--groupby", "cell_type", "--volcano", "x.svg"], "choose one: --group 'T'"),
        (["-o", "x.csv", "--cells", "cell_type == 'T'", "--heat-map", "x.svg"], "pass --groupby"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(places, command, arguments, says):
    done = command(*arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and says in done.stderr
    assert not (places / "x.csv").exists() and not (places / "x.svg").exists()
