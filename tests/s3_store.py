"""An S3 server on loopback, moto's, behind a proxy that fails as networks and stores do."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launcher import RemoteCache

KEYS = {"key": "testing", "secret": "testing"}
"""The credentials, which moto does not check."""

_ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"
_CODES = {403: b"AccessDenied", 429: b"TooManyRequests", 500: b"InternalError", 503: b"SlowDown"}
_HOPS = {"connection", "transfer-encoding", "server", "date", "content-length"}
"""Headers that are of one connection only."""


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a store, and fails as it is told.

    Args:
        port: The port of the store on loopback.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        """The address of the store for its clients."""
        self.heal()

    def heal(self) -> None:
        """Forget all faults and requests."""
        self.requests: Counter[str] = Counter()
        """The number of GET requests for each object."""
        self.num_refused = 0
        """Number of requests that have found the store down."""
        self.statuses: list[int] = []
        """Statuses with which the next GET requests fail."""
        self.cut_off = 0
        """Number of GET requests whose answer ends in the middle."""
        self.stalls: list[float] = []
        """Seconds that the next GET requests wait in the middle of their content."""
        self.write_statuses: list[int] = []
        """Statuses with which the next PUT requests fail."""
        self.lost_answers = 0
        """Number of PUT requests that are carried out and whose answer never comes."""
        self.held_name = ""
        """Part of the names of objects whose PUT requests wait and are never carried out."""
        self.is_holding = threading.Event()
        """Set while such a request waits."""
        self.releases = threading.Event()
        """Ends the wait when it is set."""
        self.writes: list[str] = []
        """The objects of PUT and DELETE requests in their order, as `PUT bucket/name`."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"  # in which a client may wait for 100 Continue

    def do_GET(self) -> None:
        proxy = self.server
        proxy.requests[self.path.partition("?")[0].rpartition("/")[2]] += 1
        if proxy.statuses:
            self._fail(proxy.statuses.pop(0))
        else:
            self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def do_PUT(self) -> None:
        proxy = self.server
        if proxy.held_name and proxy.held_name in self.path:
            proxy.is_holding.set()
            proxy.releases.wait()
            self.close_connection = True
            return
        if proxy.write_statuses:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._fail(proxy.write_statuses.pop(0))
            return
        self._pass_on()

    def do_DELETE(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def _fail(self, status: int) -> None:
        content = b"" if self.command == "HEAD" else _ERROR % _CODES[status]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _pass_on(self) -> None:
        if "/secret" in self.path:
            self._fail(403)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        store = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            headers = {name: text for name, text in self.headers.items() if name != "Expect"}
            store.request(self.command, self.path, body, headers)
            answer = store.getresponse()
            content = answer.read()
        except OSError:  # the store is down
            self.server.num_refused += 1
            self.close_connection = True
            return
        finally:
            store.close()
        if self.command in ("PUT", "DELETE") and answer.status < 300:
            path = self.path.partition("?")[0].removeprefix("/")
            self.server.writes.append(f"{self.command} {path}")
        if self.command == "PUT" and self.server.lost_answers:
            self.server.lost_answers -= 1
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOPS:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self._send(content)

    def _send(self, content: bytes) -> None:
        proxy, half = self.server, len(content) // 2
        if self.command == "GET" and (proxy.cut_off or proxy.stalls):
            self.wfile.write(content[:half])
            if proxy.stalls:
                self.wfile.flush()
                time.sleep(proxy.stalls.pop(0))
            if proxy.cut_off:
                proxy.cut_off -= 1
                self.close_connection = True
                return
            content = content[half:]
        self.wfile.write(content)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # a client that was killed, or gave up
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr."""


class S3Store:
    """An S3 server with one bucket, `bucket`, which keeps its objects while it is down."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = self._start(0)
        self._forget_objects()
        self.proxy = FaultyProxy(self._server.get_host_and_port()[1])
        """The proxy, through which all requests go."""
        self._thread = threading.Thread(target=self.proxy.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.options: dict[str, Any] = {**KEYS, "client_kwargs": {"endpoint_url": self.proxy.url}}
        """Options of the file system of s3fs."""
        import s3fs

        self.files = s3fs.S3FileSystem(**self.options)
        self.files.mkdir("bucket")

    def cache(self, folder: Any, **settings: Any) -> RemoteCache:
        """Return a cache that requests objects of this store."""
        return RemoteCache(folder=folder, options=self.options, **settings)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which another process reaches this store by `s3://bucket/...`."""
        return {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": KEYS["key"],
            "AWS_SECRET_ACCESS_KEY": KEYS["secret"],
        }

    def names(self, below: str) -> set[str]:
        """Return the names of the objects below a prefix, relative to it."""
        self.files.invalidate_cache()
        start = len(f"bucket/{below}/")
        return {name[start:] for name in self.files.find(f"bucket/{below}")}

    def put(self, name: str, content: bytes) -> str:
        """Store an object, and return its URL."""
        self.files.pipe_file(f"bucket/{name}", content)
        return f"s3://bucket/{name}"

    def age(self, name: str, seconds: float) -> None:
        """Let an object look as if it had been written so much earlier."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        stored = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].get_object("bucket", name)
        stored.last_modified -= timedelta(seconds=seconds)

    def stop(self) -> None:
        """Stop the server: connections are refused until `start`."""
        self._server.stop()

    def start(self) -> None:
        """Start the server again on its port."""
        self._server = self._start(self.proxy.port)

    def close(self) -> None:
        """Stop the server and the proxy."""
        self.proxy.releases.set()
        self.proxy.shutdown()
        self._thread.join()
        self.proxy.server_close()
        self.stop()

    def _forget_objects(self) -> None:
        """Remove what an earlier server of this process has left: moto keeps one state for all."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._server.get_host_and_port()[1], timeout=30
        )
        connection.request("POST", "/moto-api/reset")
        assert connection.getresponse().status == 200
        connection.close()

    def _start(self, port: int) -> Any:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
        return server


@contextmanager
def serve_s3() -> Iterator[S3Store]:
    """Run an S3 server while the context is open."""
    store = S3Store()
    try:
        yield store
    finally:
        store.close()
