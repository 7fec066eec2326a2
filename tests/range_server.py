"""A web server on loopback that serves a folder in ranges, and fails as real ones do."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Args:
        folder: The folder.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        """The address of the folder."""
        self.requests: Counter[str] = Counter()
        """The number of GET requests for each name."""
        self.statuses: list[int] = []
        """Statuses with which the next GET requests fail."""
        self.cut_off = 0
        """Number of GET requests whose answer ends in the middle."""
        self.stall = 0.0
        """Seconds that the next GET request waits before its content."""
        self.ignores_ranges = False
        """Whether every GET request is answered with the whole file."""


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        server, name = self.server, self.path.partition("?")[0].lstrip("/")
        if not is_head:
            server.requests[name] += 1
            if server.statuses:
                self.send_error(server.statuses.pop(0))
                return
        if name.startswith("secret"):
            self.send_error(403)
            return
        path = server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()[:16]
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        is_part = found is not None and not server.ignores_ranges
        if found is not None and is_part:
            content = content[int(found[1]) : int(found[2]) + 1]
        self.send_response(206 if is_part else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if is_head:
            return
        if server.stall:
            seconds, server.stall = server.stall, 0.0
            time.sleep(seconds)
        if server.cut_off:
            server.cut_off -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr."""


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder while the context is open."""
    with RangeServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
