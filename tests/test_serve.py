"""A published atlas over HTTP: what a Zarr client reads, and requests that are not answered."""

import http.client
import socket
import threading
from urllib.request import urlopen

import numpy as np
import pytest
import zarr

import atlasvi
from atlasvi.errors import OptionError
from atlasvi.serve import RhoServer
from tests.conftest import make_adata


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    adata = make_adata()
    atlasvi.SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = atlasvi.SCVI(adata, n_hidden=8, n_latent=2)
    model.train(1, enable_progress_bar=False)
    atlasvi.publish(model, None, folder / "my.atlasvi")
    (folder / "my.atlasvi" / "cells.zarr" / "link").symlink_to(folder / "my.atlasvi" / "index.json")
    return atlasvi.open_compact(folder / "my.atlasvi")


@pytest.fixture
def server(compact):
    with RhoServer(compact.store, 0, at_once=2) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, headers=None, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.headers)
    connection.close()
    return found


def test_every_key_is_a_path(server, compact):
    for key in ("zarr.json", "obs/zarr.json", "layers/rho/zarr.json", "layers/rho/c/0/0"):
        with urlopen(f"{server.url}/{key}") as answer:
            assert answer.read() == compact.store.read(key)


def test_a_zarr_client_reads_rho(server, compact):
    rows = {}
    for key in ("layers/rho/zarr.json", "layers/rho/c/0/0"):
        status, body, _ = ask(server, "GET", f"/{key}")
        assert status == 200
        rows[key] = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(body)
    rho = zarr.open_array(zarr.storage.MemoryStore(rows), path="layers/rho", mode="r")
    np.testing.assert_allclose(rho[:], compact.expression().compute(), rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=8-19", 206, slice(8, 20)),
        ("bytes=100-", 206, slice(100, None)),
        ("bytes=-16", 206, slice(-16, None)),
        ("bytes=0-999999999", 206, slice(None)),
        ("bytes=99999999-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=-", 400, None),
        ("bytes=5-1", 416, None),
        ("bytes=0-1,3-4", 400, None),
        ("lines=1-2", 400, None),
    ],
)
def test_ranges(asked, status, part, server, compact):
    found, body, headers = ask(server, "GET", "/layers/rho/c/0/0", {"Range": asked})
    assert found == status
    whole = compact.store.read("layers/rho/c/0/0")
    if part is not None:
        assert body == whole[part]
        assert headers["Content-Range"].endswith(f"/{len(whole)}")


def test_head_says_the_size_and_sends_nothing(server, compact):
    status, body, headers = ask(server, "HEAD", "/layers/rho/c/0/0")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(compact.store.read("layers/rho/c/0/0"))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404), ("/layers/rho/c/0/1", 404), ("/layers/rho/c/9/0", 404), ("/layers/rho/c/x/0", 404),
        ("/obs", 404), ("/../index.json", 400), ("/%2e%2e/index.json", 400), ("/a%00b", 400), ("/", 400),
        ("/" + "a" * 600, 400), ("/link", 404), ("/%ff", 400),
    ],
)  # fmt: skip
def test_other_paths(path, status, server):
    assert ask(server, "GET", path)[0] == status


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
def test_it_cannot_be_written_to(method, server, compact):
    status, _, headers = ask(server, method, "/zarr.json", body=b"x")
    assert status == 405 and headers["Allow"] == "GET, HEAD"
    assert compact.store.read("zarr.json") != b"x"


def test_a_body_is_not_read(server):
    assert ask(server, "GET", "/zarr.json", body=b"x" * 10)[0] == 413


def test_more_than_so_many_at_once_are_told_to_wait(server, monkeypatch):
    go, begun = threading.Event(), threading.Semaphore(0)

    def slow(self, key):
        begun.release()
        go.wait(20)
        return b"late"

    monkeypatch.setattr(type(server.store), "read", slow)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server, "GET", "/a"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        begun.acquire(timeout=20)
    status, _, headers = ask(server, "GET", "/b")
    assert status == 503 and headers["Retry-After"] == "1"
    go.set()
    for thread in threads:
        thread.join()
    assert [answer[:2] for answer in answers] == [(200, b"late")] * 2


def test_nonsense_is_answered_or_closed(server):
    for line in (
        b"\x00\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /zarr.json HTTP/9.9\r\n\r\n",
        b"G" * 70_000 + b"\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.server_address[1]), 20) as s:
            s.sendall(line)
            s.shutdown(socket.SHUT_WR)
            assert b"200" not in s.recv(100)
    assert ask(server, "GET", "/zarr.json")[0] == 200


def test_it_is_of_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


def test_ports_that_cannot_be_had(server, compact):
    for port in (server.server_address[1], -1, 70_000):
        with pytest.raises(OptionError, match=str(port)):
            RhoServer(compact.store, port)
    with pytest.raises(OptionError, match="at_once"):
        RhoServer(compact.store, 0, at_once=0)
