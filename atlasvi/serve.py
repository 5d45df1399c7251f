"""A published atlas over HTTP, read-only and on this machine: each key of its Zarr store is a path."""

from __future__ import annotations

import http.server
import re
import threading
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

from atlasvi.errors import AtlasviError, OptionError
from atlasvi.infer.compact import RhoStore

# Keys of a Zarr store have none but these, and none is long.
_KEY = re.compile(rb"[A-Za-z0-9._ -][A-Za-z0-9._/ -]{0,511}")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_IDLE_SECONDS = 30


class RhoServer(http.server.ThreadingHTTPServer):
    """Answers GET and HEAD on ``127.0.0.1``; no more than so many at a time, others are told to come again.

    Args:
        store: what is served.
        port: 0 for any that is free.
        at_once: requests answered at a time, and connections held open at most four times as many.

    Raises:
        OptionError: a port that cannot be had.
    """

    daemon_threads = True

    def __init__(self, store: RhoStore, port: int = 8000, *, at_once: int = 8) -> None:
        if not 0 <= port < 1 << 16 or at_once < 1:
            raise OptionError(f"port {port} and at_once {at_once}: need 0 <= port < 65536 and at_once >= 1")
        self.store = store
        self.at_work = threading.BoundedSemaphore(at_once)
        self._connections = threading.BoundedSemaphore(4 * at_once)
        try:
            super().__init__(("127.0.0.1", port), _Answer)
        except OSError as error:
            raise OptionError(
                f"port {port} cannot be had ({error.strerror}); choose another with --port"
            ) from error

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, or close it where there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer until the other side has no more to ask."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()


class _Answer(http.server.BaseHTTPRequestHandler):
    server: RhoServer
    protocol_version = "HTTP/1.1"
    server_version = "atlasvi"
    sys_version = ""
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _refuse_method(self) -> None:
        # What else was sent is not read: the connection ends here.
        self.close_connection = True
        self._send(
            HTTPStatus.METHOD_NOT_ALLOWED, b"this store is read-only\n", headers={"Allow": "GET, HEAD"}
        )

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse_method

    def _answer(self, *, with_body: bool) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            return self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"a request has no body\n")
        key = unquote_to_bytes(self.path.split("?")[0].lstrip("/"))
        if not _KEY.fullmatch(key) or b".." in key:
            return self._send(HTTPStatus.BAD_REQUEST, b"no key of a Zarr store\n")
        asked = self.headers.get("Range")
        part = None if asked is None else _RANGE.fullmatch(asked.strip())
        if asked is not None and (part is None or part[1] == part[2] == ""):
            return self._send(HTTPStatus.BAD_REQUEST, b"no range that is understood: bytes=FIRST-LAST\n")
        if not self.server.at_work.acquire(blocking=False):
            return self._send(HTTPStatus.SERVICE_UNAVAILABLE, b"busy\n", headers={"Retry-After": "1"})
        try:
            value = self.server.store.read(key.decode())
        except (AtlasviError, OSError) as error:
            self.log_error("%s", error)
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, b"it cannot be read\n")
        finally:
            self.server.at_work.release()
        if value is None:
            return self._send(HTTPStatus.NOT_FOUND, b"there is no such key\n")
        if part is None:
            return self._send(HTTPStatus.OK, value, with_body=with_body, headers={"Accept-Ranges": "bytes"})
        first, last = _bounds(part[1], part[2], len(value))
        if first > last:
            size = {"Content-Range": f"bytes */{len(value)}"}
            return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers=size)
        where = {"Content-Range": f"bytes {first}-{last}/{len(value)}"}
        self._send(HTTPStatus.PARTIAL_CONTENT, value[first : last + 1], with_body=with_body, headers=where)

    def _send(
        self,
        status: HTTPStatus,
        body: bytes,
        *,
        with_body: bool = True,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing of what went well."""

    def log_error(self, format: str, *arguments: Any) -> None:
        """Say what did not, unless it is the other side that was slow."""
        if not format.startswith("Request timed out"):
            super().log_message(format, *arguments)


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    """First and last byte of a range; the last ones are asked for with no first."""
    if first == "":
        return max(0, size - int(last)), size - 1 if int(last) else -1
    return int(first), min(int(last), size - 1) if last else size - 1


__all__ = ["RhoServer"]
