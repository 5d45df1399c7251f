"""Atlases behind a URL give what the disk gives; what fails is tried again, then named.

The server answers HTTP with ranges, and as much of S3's protocol as reading takes. It fails on request.
"""

import contextlib
import json
import pickle
import sys
import threading
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import anndata
import fsspec
import google_crc32c
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from atlasvi import SCVI
from atlasvi.cli import main
from atlasvi.errors import CorruptError, NotAnAtlasError, OptionError, StoreError
from atlasvi.store import layout, remote
from atlasvi.store.atlas import as_atlas
from atlasvi.store.atlas import open as open_atlas
from atlasvi.store.ingest import ingest
from atlasvi.store.sources import open_source

pytest.importorskip("obstore", reason="atlases behind a URL need obstore")

SHARD = "/own.zarr/X/indices/c/1"


def make_adata():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["b1", "b2"], 300)),
            "percent_mito": rng.uniform(0, 10, 300),
            "donor": rng.choice(["ann", "bob"], 300),
        },
        index=[f"cell-{i}" for i in range(300)],
    )
    counts = sp.csr_matrix(rng.negative_binomial(0.5, 0.3, (300, 60)).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene-{g}" for g in range(60)]))


def write_zarr(adata, path, zarr_format=3):
    with anndata.settings.override(zarr_write_format=zarr_format), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zarr on consolidated metadata
        adata.write_zarr(path)


class Handler(BaseHTTPRequestHandler):
    """Files of a folder. ``/bucket/...`` is the same folder, which as a bucket can also be listed."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.server.is_gone:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        path = url.path.removeprefix("/bucket") or "/"
        self.server.asked[path] += 1
        self.server.ranges.append((path, self.headers.get("Range")))
        file = Path(f"{self.server.folder}{path}")
        if self.server.failing[path] > 0:
            self.server.failing[path] -= 1
            self.answer(self.server.status, b"go away")
        elif "list-type" in url.query:
            self.answer(200, self.server.listing(parse_qs(url.query)["prefix"][0]))
        elif not file.is_file():
            self.answer(404, b"")
        else:
            self.give(path, bytearray(file.read_bytes()))

    def give(self, path, content):
        if path in self.server.altered:
            content[self.server.altered[path]] ^= 1
        size, asked = len(content), self.headers.get("Range")
        if asked is None or not self.server.ranged:
            return self.answer(200, content)
        first, last = asked.removeprefix("bytes=").split("-")
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        return self.answer(206, content[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        about = {"Content-Length": len(body), "Last-Modified": "Sat, 21 Nov 2026 12:00:00 GMT"}
        for key, value in {**about, **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.server.cut > 0 and status in (200, 206) and len(body) > 1:
            self.server.cut -= 1
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked, self.failing, self.altered = Counter(), Counter(), {}
        self.status, self.cut, self.ranged, self.ranges = 503, 0, True, []
        self.is_gone = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self, prefix):
        parent = Path(f"{self.folder}/{prefix}")
        names = sorted(parent.iterdir()) if parent.is_dir() else []
        keys = "".join(
            f"<CommonPrefixes><Prefix>{prefix}{p.name}/</Prefix></CommonPrefixes>"
            if p.is_dir()
            else f"<Contents><Key>{prefix}{p.name}</Key><Size>{p.stat().st_size}</Size>"
            "<LastModified>2026-11-21T12:00:00.000Z</LastModified></Contents>"
            for p in names
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>".encode()


@contextlib.contextmanager
def serving(folder):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.is_gone = True  # to connections that are kept, too
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``own.zarr``, an atlas of several shards, and what other tools write of the same cells."""
    folder = tmp_path_factory.mktemp("served")
    adata = make_adata()
    adata.layers["double"] = adata.X * 2
    adata.obsm["X_pca"] = np.arange(600.0).reshape(300, 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "CHUNK_ENTRIES", 256)
        patched.setattr(layout, "CHUNKS_PER_SHARD", 4)
        ingest(adata, folder / "own.zarr")
    write_zarr(adata, folder / "other.zarr")
    write_zarr(adata, folder / "old.zarr", zarr_format=2)
    return folder


@pytest.fixture
def server(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture
def bucket(server, monkeypatch):
    for key, value in {
        "AWS_ENDPOINT_URL": server.url, "AWS_REGION": "us-east-1", "AWS_SKIP_SIGNATURE": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    return "s3://bucket"


@pytest.fixture
def in_memory(folder):
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/served", recursive=True)
    yield "memory://served"
    files.rm("/served", recursive=True)


@pytest.fixture(params=["http", "s3", "memory"])
def root(request):
    """The folder as a URL, by each of the ways there are."""
    if request.param == "http":
        return request.getfixturevalue("server").url
    return request.getfixturevalue({"s3": "bucket", "memory": "in_memory"}[request.param])


def same(one, other):
    for a, b in zip(one.numpy(), other.numpy(), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- the same as from the disk


@pytest.mark.parametrize("name", ["own.zarr", "other.zarr", "old.zarr"])
def test_a_url_gives_what_the_disk_gives(folder, root, name):
    with open_atlas(f"{root}/{name}") as far, open_atlas(folder / name) as near:
        assert (far.shape, far.name, far.path) == (near.shape, f"{root}/{name}", None)
        pd.testing.assert_frame_equal(far.obs, near.obs)
        pd.testing.assert_frame_equal(far.var, near.var)
        for rows in (slice(None), slice(40, 41), slice(0, 0), [5, 299, 5, 100], slice(250, 10, -7)):
            same(far.read_rows(rows), near.read_rows(rows))
        genes = ["gene-9", "gene-3"]
        same(far[::2, genes].read_rows([4, 2]), near[::2, genes].read_rows([4, 2]))
        assert far.bytes_per_row == near.bytes_per_row
        assert near.statistics().mean.tolist() == far.statistics().mean.tolist()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_stream_is_the_same(folder, server, num_workers):
    kwargs = {"seed": 3, "epoch": 1, "num_workers": num_workers}
    with open_atlas(f"{server.url}/own.zarr") as far, open_atlas(folder / "own.zarr") as near:
        pairs = zip(far.stream(32, **kwargs), near.stream(32, **kwargs), strict=True)
        for (counts, rows), (expected, expected_rows) in pairs:
            np.testing.assert_array_equal(rows, expected_rows)
            same(counts, expected)


def test_a_model_trained_from_a_url_is_the_same(folder, server):
    fits = []
    for place in (f"{server.url}/own.zarr", folder / "own.zarr"):
        atlas = as_atlas(place)
        SCVI.setup_anndata(atlas, batch_key="batch", continuous_covariate_keys=["percent_mito"])
        model = SCVI(atlas, n_hidden=8, n_latent=3)
        model.train(max_epochs=2, batch_size=64, enable_progress_bar=False)
        latent, rho = model.get_latent_representation(), model.expression(genes=["gene-1"])[:9].compute()
        fits.append((model.history["elbo_train"].to_numpy(), latent, rho))
    for far, near in zip(*fits, strict=True):
        np.testing.assert_array_equal(far, near)


def test_a_url_and_a_folder_are_opened_as_one(folder, server):
    with open_atlas({"far": f"{server.url}/own.zarr", "near": folder / "own.zarr"}, make_unique=True) as both:
        same(both.read_rows(slice(0, 300)), both.read_rows(slice(300, 600)))
        assert both.obs_column("input").categories.tolist() == ["far", "near"]


def test_another_process_opens_the_url_again(folder, server):
    with open_atlas(f"{server.url}/own.zarr") as far:
        again = pickle.loads(pickle.dumps(far[10:20]))
        same(again.read_rows(slice(None)), far.read_rows(slice(10, 20)))


# --- without listing, and as few requests as there can be


def test_http_is_never_asked_for_a_list(server):
    """What stands under a known name is found; of the rest, consolidated metadata say what there is."""
    with open_atlas(f"{server.url}/other.zarr", layer="double") as far:
        assert far.read_rows(slice(None)).to_scipy().sum() == 2 * make_adata().X.sum()
    with pytest.raises(OptionError, match=r"no layer 'spliced'; there are 'double'"):
        open_atlas(f"{server.url}/other.zarr", layer="spliced")
    with pytest.raises(OptionError, match=r"own.zarr' has no layer 'double'; leave layer out"):
        open_atlas(f"{server.url}/own.zarr", layer="double")
    assert "X_pca" in open_source(f"{server.url}/other.zarr").extras().obsm


@pytest.fixture
def bare(server, folder, tmp_path):
    """The server, which now has but a store without consolidated metadata."""
    write_zarr(anndata.read_zarr(folder / "other.zarr"), tmp_path / "bare.zarr")
    path = tmp_path / "bare.zarr" / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["consolidated_metadata"]
    path.write_text(json.dumps(metadata))
    server.folder = tmp_path
    return server


def test_a_layer_is_found_where_nothing_lists_it(bare):
    source = open_source(f"{bare.url}/bare.zarr", "double")
    assert source.read_rows(0, 300).to_scipy().sum() == 2 * make_adata().X.sum()
    extras = source.extras()
    assert extras.obsm == {} and extras.uns is None
    assert any("obsm, uns and the rest, as the server does not list" in part for part in extras.left_out)


def test_a_bucket_is_listed_and_a_list_that_fails_is_asked_for_again(bare, bucket):
    bare.failing["/"] = 2
    source = open_source(f"{bucket}/bare.zarr")
    assert bare.failing["/"] == 0
    extras = source.extras()
    assert list(extras.obsm) == ["X_pca"] and extras.left_out == () and "double" in extras.elsewhere
    np.testing.assert_array_equal(extras.obsm["X_pca"][3:5], [[6, 7], [8, 9]])


def test_the_entries_of_a_shard_take_one_request(server):
    with open_atlas(f"{server.url}/own.zarr") as far:
        server.ranges.clear()
        far.read_rows(slice(0, 40))
        n_shards = len({path for path, _ in server.ranges})
        assert len(server.ranges) == 2 * n_shards  # an index, and chunks
        server.ranges.clear()
        far.read_rows(slice(0, 40))
        assert len(server.ranges) == n_shards
        assert all(asked.startswith("bytes=") for _, asked in server.ranges)


def test_an_atlas_is_ingested_from_a_url(server, folder, tmp_path):
    report = ingest(f"{server.url}/other.zarr", tmp_path / "copy.zarr")
    with open_atlas(report.path) as copy, open_atlas(folder / "own.zarr") as near:
        same(copy.read_rows(slice(None)), near.read_rows(slice(None)))
    assert "X_pca" in zarr.open_group(str(report.path), mode="r")["obsm"]


def test_what_is_stored_by_genes_is_refused_or_ingested(folder, tmp_path):
    adata = make_adata()
    write_zarr(anndata.AnnData(sp.csc_matrix(adata.X), adata.obs, adata.var), tmp_path / "csc.zarr")
    with serving(tmp_path) as server:
        with pytest.raises(OptionError, match=r"csc.zarr' X is stored as csc_matrix, by genes"):
            open_atlas(f"{server.url}/csc.zarr")
        ingest(f"{server.url}/csc.zarr", tmp_path / "by-cells.zarr")
    with open_atlas(tmp_path / "by-cells.zarr") as made, open_atlas(folder / "own.zarr") as near:
        same(made.read_rows(slice(None)), near.read_rows(slice(None)))


# --- what fails is tried again, and then named


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_read_that_fails_twice_is_tried_again(folder, server, status):
    server.status, server.failing[SHARD] = status, 2
    with open_atlas(f"{server.url}/own.zarr") as far, open_atlas(folder / "own.zarr") as near:
        same(far.read_rows(slice(None)), near.read_rows(slice(None)))
    assert server.failing[SHARD] == 0 and server.asked[SHARD] == 4


def test_an_answer_that_breaks_off_is_asked_for_again(folder, server):
    with open_atlas(f"{server.url}/own.zarr") as far, open_atlas(folder / "own.zarr") as near:
        server.cut = 2
        same(far.read_rows(slice(None)), near.read_rows(slice(None)))
    assert server.cut == 0


def test_metadata_and_columns_are_tried_again_too(server):
    for path in ("zarr.json", "X/indptr/c/0", "obs/batch/codes/c/0", "obs/_index/c/0"):
        server.failing[f"/own.zarr/{path}"] = 2
    with open_atlas(f"{server.url}/own.zarr") as far:
        assert far.obs["batch"].tolist() == make_adata().obs["batch"].tolist()
    assert not +server.failing


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_read_that_goes_on_failing_is_named_in_one_line(server, num_workers):
    with open_atlas(f"{server.url}/own.zarr") as far:
        server.failing[SHARD] = 10**6
        with pytest.raises(StoreError) as caught:
            list(far.stream(64, num_workers=num_workers))
    message = str(caught.value)
    assert not isinstance(caught.value, CorruptError) and "\n" not in message
    assert "own.zarr' X: rows " in message and f"{server.url}{SHARD} cannot be read in 4 tries" in message
    assert "503 Service Unavailable" in message and "then run it again" in message


def test_a_server_that_is_not_there_is_named(folder):
    with serving(folder) as server:
        url = f"{server.url}/own.zarr"
        with open_atlas(url) as far:
            pass
    with pytest.raises(StoreError, match=r"own.zarr/zarr.json cannot be read in 4 tries \("):
        open_atlas(url)
    with pytest.raises(StoreError, match=r"obs\['batch'\]: rows 0 to 300 cannot be read: .* in 4 tries"):
        far.obs_column("batch")


@pytest.mark.parametrize("status", [401, 403])
def test_what_may_not_be_read_is_not_tried_again(server, status):
    server.status, server.failing["/own.zarr/zarr.json"] = status, 10**6
    with pytest.raises(StoreError, match=r"zarr.json cannot be read \(.*AWS_SKIP_SIGNATURE=true"):
        open_atlas(f"{server.url}/own.zarr")
    assert server.asked["/own.zarr/zarr.json"] == 1


def test_a_server_that_gives_whole_files_only_is_named(server):
    server.ranged = False
    with open_atlas(f"{server.url}/own.zarr") as far, pytest.raises(StoreError, match="parts of a file"):
        far.read_rows(slice(0, 3))


# --- damage


@pytest.mark.parametrize("at", [0, -1])
def test_an_altered_byte_is_named_with_shard_and_rows(folder, server, at):
    server.altered[SHARD] = at
    with open_atlas(f"{server.url}/own.zarr") as far:
        with pytest.raises(CorruptError) as caught:
            far.read_rows(slice(None))
        assert f"shard {server.url}{SHARD} has a wrong checksum" in str(caught.value)
        indptr = np.r_[0, np.cumsum(np.diff(make_adata().X.tocsr().indptr))]
        length = zarr.open_array(str(folder / "own.zarr/X/indices"), mode="r").shards[0]
        first, last = np.searchsorted(indptr, [length, 2 * length - 1], side="right") - 1
        assert f"the counts of rows {first} to {last} are damaged" in str(caught.value)
        far.read_rows(slice(0, first))
        server.altered.clear()
        far.read_rows(slice(None))


def test_an_altered_byte_elsewhere_is_named(server):
    server.altered["/own.zarr/X/indptr/c/0"] = 20
    with pytest.raises(CorruptError, match=r"own.zarr' X: rows 0 to 300 cannot be read"):
        open_atlas(f"{server.url}/own.zarr")
    server.altered = {"/own.zarr/obs/batch/codes/c/0": 20}
    with (
        open_atlas(f"{server.url}/own.zarr") as far,
        pytest.raises(CorruptError, match=r"obs\['batch'\]: rows 0 to 300 cannot be read"),
    ):
        far.obs_column("batch")


def test_a_missing_shard_is_named(server, root):
    with open_atlas(f"{root}/own.zarr") as far, pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote.RemoteVector, "_path", lambda self, k: self.folder / "c" / str(k + 1000))
        with pytest.raises(CorruptError, match=r"X/indices/c/1000 is missing: the counts of rows 0 to"):
            far.read_rows(slice(0, 3))


def test_a_shard_that_is_replaced_meanwhile_is_read_as_it_then_is(folder, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "CHUNK_ENTRIES", 256)
        ingest(make_adata(), tmp_path / "own.zarr")
    path = next((tmp_path / "own.zarr/X/data/c").iterdir())
    array = zarr.open_array(str(path.parents[1]), mode="r")
    n_chunks = array.shards[0] // array.chunks[0]
    with serving(tmp_path) as server, open_atlas(f"{server.url}/own.zarr") as far:
        before = far.read_rows(slice(None))
        content = path.read_bytes()
        index = np.frombuffer(content[-16 * n_chunks - 4 : -4], "<u8").reshape(-1, 2).copy()
        index[index[:, 0] < 2**60, 0] += 7
        raw = index.tobytes()
        path.write_bytes(
            b"0123456" + content[: -16 * n_chunks - 4] + raw + google_crc32c.value(raw).to_bytes(4, "little")
        )
        same(far.read_rows(slice(None)), before)


# --- what cannot be


def test_commands_take_urls(folder, server, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["atlasvi", *map(str, words)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    url, model = f"{server.url}/own.zarr", tmp_path / "model"
    code, out, _ = run("info", url)
    assert code == 0 and "300" in out and "batch" in out and "on disk" not in out
    assert run("train", url, "-o", model, "--max-epochs", 1, "--n-hidden", 8, "--n-latent", 3)[0] == 0
    code, _, said = run("latent", model, url)
    assert code == 1 and f"obsm['X_scVI'] cannot be written to '{url}', which is not on this disk" in said
    write_zarr(make_adata(), tmp_path / "copy.zarr")
    assert run("latent", model, url, "-o", tmp_path / "copy.zarr")[0] == 0
    assert run("decode", model, url, "-o", tmp_path / "rho.zarr", "-g", "gene-3")[0] == 0
    assert anndata.read_zarr(tmp_path / "rho.zarr").shape == (300, 1)
    assert run("ingest", url, "-o", tmp_path / "ingested.zarr")[0] == 0
    with open_atlas(tmp_path / "ingested.zarr") as copy, open_atlas(folder / "own.zarr") as near:
        same(copy.read_rows(slice(None)), near.read_rows(slice(None)))


def test_nothing_is_written_to_a_url(server):
    with open_atlas(f"{server.url}/own.zarr") as far:
        with pytest.raises(OptionError, match=r"obsm\['X_scVI'\] cannot be written to 'http.*only read"):
            far.write_obsm("X_scVI", [np.zeros((300, 2))], 2)
        with pytest.raises(ValueError, match="read-only"):
            far._source._group.create_group("new")


def test_what_is_no_atlas_is_named(server, bucket, folder):
    for root in (server.url, bucket):
        with pytest.raises(NotAnAtlasError, match=r"nothing.zarr' is not an atlas: there is no zarr.json"):
            open_atlas(f"{root}/nothing.zarr")
        with pytest.raises(NotAnAtlasError, match=r"X' is a Zarr store but not an AnnData"):
            open_atlas(f"{root}/own.zarr/X")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(OptionError, match=r"'s3://b/a.zarr' needs .* pip install 'atlasvi\[remote\]'"):
        open_atlas("s3://b/a.zarr")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(OptionError, match=r"'gcs://b/a.zarr' cannot be opened \(Please install gcsfs"):
        open_atlas("gcs://b/a.zarr")


def test_a_url_that_cannot_be_is_named():
    with pytest.raises(OptionError, match=r"'nope://b/a.zarr' cannot be opened \(Protocol not known: nope"):
        open_atlas("nope://b/a.zarr")
    with pytest.raises(OptionError, match=r"'s3://' cannot be opened"):
        open_atlas("s3://")
