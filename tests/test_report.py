"""The report: one file that stands alone, says what it was given, and comes out the same twice."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from atlasvi import plots
from atlasvi.errors import CellsError, OptionError, StoreError
from atlasvi.metrics import ClusteringScores, LatentScores, MixingScore, decode_check
from atlasvi.report import (
    Decoding,
    ElboCurve,
    Embedding,
    Report,
    StepCost,
    Stopwatch,
    embed,
    format_bytes,
    format_seconds,
    package_versions,
    readme_picture,
    report_html,
    write_report,
)

VOID = {"meta", "br", "img", "input", "link", "hr"}


def scores(name, ari, entropy):
    return LatentScores(
        name,
        ClusteringScores(ari, 0.7, n_clusters=3, n_used=600),
        MixingScore(entropy, 0.01, ceiling=1.1, n_neighbors=50, n_used=600),
        silhouette=0.2,
        n_silhouette=500,
    )


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    types = pd.Categorical(rng.choice(["A1", "A2", "<b>&", "empty"], 600))
    true = rng.dirichlet(np.ones(40), 300)
    decoded = true * rng.lognormal(0, 0.2, true.shape)
    check = decode_check(decoded, true, types[:300])
    return Report(
        title="A <demo> & more",
        summary="SCVI found the types.",
        n_obs=50_000,
        n_vars=2_000,
        n_batches=3,
        steps=(
            StepCost("ingest", 4.2, 500_000_000, "to Zarr"),
            StepCost("train", 130.0, 1_320_000_000),
            StepCost("picture", 9.9),
        ),
        elbo=ElboCurve((1, 2, 3, 4), (900.0, 700.0, 650.5, 640.25), (910.0, float("nan"), 660.0, 661.5)),
        embedding=Embedding(
            rng.normal(size=(600, 2)), types, pd.Categorical(rng.choice(["x", "y"], 600)), 50_000, "t-SNE"
        ),
        scores=(scores("SCVI", 0.912, 1.05), scores("PCA", 0.4, 0.2)),
        scored="On single cells.",
        decoding=Decoding(check, tuple(f"G{k}" for k in range(40)), (3, 1)),
        seed=7,
        versions=(("torch", "9.9"),),
        command="atlasvi demo -o out",
        snippet="import atlasvi  # <go on>",
    )


class Page(HTMLParser):
    """Checks that tags are balanced, and collects text, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_page_says_what_it_was_given(report):
    text = Page(report_html(report)).text
    for words in (
        "A <demo> & more", "SCVI found the types.", "50,000", "2,000", "1.32 GB", "2 min 24 s",
        "640.2 nats", "661.5 nats", "660.0 nats", "0.912", "0.400", "1.050", "of 1.10 nats",
        "for looking and not for measuring", "600 of 50,000 cells", "t-SNE", "On single cells.",
        "<b>&", "G3", "not measured", "to Zarr", "atlasvi demo -o out", "# <go on>", "9.9", "seed",
    ):  # fmt: skip
        assert words in text, words


def test_the_page_stands_alone_and_is_accessible(report):
    html = report_html(report)
    page = Page(html)
    assert "<script" not in html and "http" not in html and "url(" not in html and "@import" not in html
    assert not [a for _, a in page.tags if "src" in a or "href" in a or any(k.startswith("on") for k in a)]
    images = [attrs for tag, attrs in page.tags if tag == "svg" and "role" in attrs]
    assert len(images) == 5 and all(a["role"] == "img" and a["aria-label"] for a in images)
    headers = [attrs for tag, attrs in page.tags if tag == "th"]
    assert headers and all(a["scope"] in ("row", "col") for a in headers)
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table")
    assert dict(page.tags)["html"]["lang"] == "en"


def test_the_best_of_each_score_is_in_bold(report):
    html = report_html(report)
    assert "<b>0.912</b>" in html and "<b>0.400</b>" not in html and "<b>1.050</b>" in html
    # Bars: of one, and of the ceiling.
    assert "width:91.2%" in html and "width:95.5%" in html


def test_the_same_parts_make_the_same_bytes(report, tmp_path):
    a = write_report(tmp_path / "a.html", report)
    code = "import sys, pickle; from atlasvi.report import report_html;"
    code += "sys.stdout.buffer.write(report_html(pickle.load(sys.stdin.buffer)).encode())"
    env = {"PYTHONHASHSEED": "77", "PATH": ""}
    other = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(report), capture_output=True, check=True, env=env
    )
    assert other.stdout == a.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_parts_may_be_missing(report):
    bare = Report("T", "S", 10, 5, 1, ())
    text = Page(report_html(bare)).text
    assert "batch" in text and "Scores" not in text and "Time and memory" not in text
    untyped = dataclasses.replace(report, embedding=dataclasses.replace(report.embedding, types=None))
    assert "By cell type" not in report_html(untyped) and "By batch" in report_html(untyped)
    Page(report_html(dataclasses.replace(report, elbo=ElboCurve((0,), (5.0,)))))


def test_a_large_report_stays_small(report):
    rng = np.random.default_rng(0)
    n = 6_000
    types = pd.Categorical([f"type {k}" for k in rng.integers(0, 30, n)])
    view = Embedding(rng.normal(size=(n, 2)), types, types, n, "t-SNE")
    true = rng.dirichlet(np.ones(2_000), 200)
    decoding = Decoding(
        decode_check(true, true, types[:200]), tuple(f"G{k}" for k in range(2_000)), tuple(range(60))
    )
    html = report_html(dataclasses.replace(report, embedding=view, decoding=decoding))
    assert len(html.encode()) < 3_000_000
    assert "All 6,000 cells" in html


def test_a_report_that_cannot_be_written_leaves_nothing(report, tmp_path):
    with pytest.raises(StoreError, match=r"cannot write .*none.r\.html: No such file"):
        write_report(tmp_path / "none" / "r.html", report)
    (tmp_path / "taken").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        write_report(tmp_path / "taken", report)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_readme_picture(report, tmp_path):
    path = readme_picture(report, tmp_path / "demo.svg")
    root = ET.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    dots = [e.get("d").count("M") for e in root.iter("{http://www.w3.org/2000/svg}path")]
    assert sum(dots) == 2 * 600
    with pytest.raises(OptionError, match=r"would be named 'demo.png'; end the path in .svg"):
        readme_picture(report, tmp_path / "demo.png")
    with pytest.raises(OptionError, match="needs a report with an embedding"):
        readme_picture(dataclasses.replace(report, elbo=None), tmp_path / "demo.svg")


def test_embed_keeps_far_groups_apart_and_is_seeded():
    rng = np.random.default_rng(0)
    types = rng.choice(["p", "q"], 300)
    latent = rng.normal(size=(300, 5)) + 30 * (types == "q")[:, None]
    view = embed(latent, ["b"] * 300, types, seed=0, max_cells=150)
    assert view.xy.shape == (150, 2) and view.n_total == 300 and "perplexity 30" in view.method
    centres = [view.xy[np.asarray(view.types) == t].mean(0) for t in "pq"]
    spread = max(view.xy[np.asarray(view.types) == t].std() for t in "pq")
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    assert np.array_equal(view.xy, embed(latent, ["b"] * 300, types, seed=0, max_cells=150).xy)
    with pytest.raises(CellsError, match="latent of 300 cells, 299 batches and no types"):
        embed(latent, ["b"] * 299, seed=0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (187, "3 min 07 s"),
     (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_sizes():
    assert [format_bytes(n) for n in (2_000, 14_200_000, 999_600_000, 1_320_000_000)] == [
        "2 kB", "14 MB", "1.00 GB", "1.32 GB",
    ]  # fmt: skip


def test_stopwatch():
    watch = Stopwatch()
    with watch.step("sleep", "a while"):
        time.sleep(0.12)
    with watch.step("fill"):
        block = np.ones(30_000_000)
        time.sleep(0.1)
        del block
    with pytest.raises(ZeroDivisionError), watch.step("fail"):
        raise ZeroDivisionError
    sleep, fill = watch.steps
    assert (sleep.name, sleep.note, fill.name) == ("sleep", "a while", "fill")
    assert 0.12 <= sleep.seconds < 1
    if sys.platform == "linux":
        assert fill.peak_bytes - sleep.peak_bytes == pytest.approx(240e6, rel=0.1)


def test_versions():
    found = dict(package_versions())
    assert found["Python"] == ".".join(map(str, sys.version_info[:3])) and found["numpy"] == np.__version__


def test_axis_ticks_are_round_and_within():
    axis = plots.Axis(0.3, 9.7, 0, 100)
    assert axis.ticks() == [2, 4, 6, 8] and axis(5.0) == pytest.approx(50)
    assert plots.Axis(900, 1_060, 0, 1).ticks() == [900, 950, 1000, 1050]
    log = plots.Axis(3e-5, 2e-2, 0, 100, log=True)
    assert log.ticks() == pytest.approx([1e-4, 1e-3, 1e-2])
    assert log(3e-5) == 0 and log(2e-2) == pytest.approx(100)


def test_points_are_drawn_where_they_are():
    svg = plots.scatter(
        np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), np.array([0, 0, 1]), ["red", "blue"], alt="", size=136
    )
    root = ET.fromstring(svg)
    found = {}
    for path in root.iter("path"):
        found.setdefault(path.get("stroke"), []).extend(re.findall(r"M([\d.]+) ([\d.]+)", path.get("d")))
    # 100 px for a width of 2, centred in the height, upwards being up.
    assert sorted(found["red"]) == [("118.0", "93.0"), ("18.0", "93.0")]
    assert found["blue"] == [("18.0", "43.0")]


def test_names_do_not_cover_each_other():
    points = np.random.default_rng(0).normal(scale=1.0, size=(800, 2)).repeat(1, axis=0)
    codes = np.arange(800) % 8
    root = ET.fromstring(
        plots.scatter(points, codes, plots.palette(list("abcdefgh")), alt="x", labels=["a name"] * 8)
    )
    at = [(float(t.get("x")), float(t.get("y"))) for t in root.iter("text")]
    assert len(at) == 8
    for i, (x, y) in enumerate(at):
        assert all(abs(x - u) > 40 or abs(y - v) > 16 for u, v in at[:i])


def test_long_names_are_numbered_and_the_legend_says_so():
    long = [f"a rather long name {k}" for k in range(12)]
    assert plots.marks(list("abc"), 500) == list("abc")
    marks = plots.marks(long, 500)
    assert marks == [str(k + 1) for k in range(12)]
    assert "<b>3</b> a rather long name 2" in plots.legend(long, plots.palette(long), marks)
    assert "<b>" not in plots.legend(long, plots.palette(long), long)


def test_lines_are_drawn_to_scale_and_cut_at_the_frame():
    y = [1e6, *np.linspace(20, 10, 20)]
    svg = plots.line_chart([plots.Line("a", range(21), y, "red")], x_label="x", y_label="y", alt="z")
    root = ET.fromstring(svg)
    inner = root.find("svg")
    points = [tuple(map(float, p.split(","))) for p in inner.find("polyline").get("points").split()]
    left, top, width, height = map(float, inner.get("viewBox").split())
    assert len(points) == 21 and points[0][1] < top
    assert all(left <= u <= left + width and top <= v <= top + height for u, v in points[1:] if u > left + 50)
    drops = np.diff([v for _, v in points[2:]])
    assert np.allclose(drops, drops[0], atol=0.11) and drops[0] > 0
    titles = [t.text for t in root.iter("title")]
    assert "a, x 20: 10.0" in titles


def test_a_palette_repeats_only_when_it_must():
    names = [str(k) for k in range(12)]
    assert len(set(plots.palette(names))) == 12 == len(set(plots.palette(names, second=True)))
    assert plots.palette(["a", "empty", "b"], grey=["empty"])[1] == plots.GREY
    assert not set(plots.palette(names[:4])) & set(plots.palette(names[:4], second=True))


def test_a_chart_without_values_is_an_error():
    with pytest.raises(OptionError, match="no finite value to draw in 'nothing'"):
        plots.line_chart([plots.Line("a", [1], [float("nan")], "red")], x_label="", y_label="", alt="nothing")


def test_neither_matplotlib_nor_sklearn_is_imported():
    code = "import sys, atlasvi.report, atlasvi.simulate;"
    code += "print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
