"""Real stores on loopback: moto's S3 server, and a web server that misbehaves on demand."""

import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from typing import Any

import pytest

LINE = re.compile(r"([A-Z]+) (\S+) HTTP")


class S3Store(logging.Handler):
    """moto's server in threads of this process, one for all tests: connections to it may be kept."""

    def __init__(self) -> None:
        super().__init__()
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        self.url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        self.requests: list[tuple[str, str]] = []
        """(method, path) of each request."""
        log = logging.getLogger("werkzeug")
        log.setLevel(logging.INFO)
        log.addHandler(self)
        log.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if found := LINE.search(record.getMessage()):
            self.requests.append((found[1], found[2]))

    def put(self, bucket: str, files: dict[str, bytes]) -> str:
        """Make a bucket that holds these files; returns its URL."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.url)
        client.create_bucket(Bucket=bucket)
        for name, content in files.items():
            client.put_object(Bucket=bucket, Key=name, Body=content)
        return f"s3://{bucket}"

    def gets(self, path: str) -> int:
        """GETs of "/bucket/key" so far."""
        return self.requests.count(("GET", path))


@cache
def _s3_store() -> S3Store:
    return S3Store()


def s3_store(monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """The S3 server, to which this test's environment points with made-up credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    store = _s3_store()
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    return store


class WebStore(ThreadingHTTPServer):
    """A web server of the files in ``files``, by path. Use it as a context manager.

    ``faults[path]`` says what it does to the next requests for a file, one word each: "" answers; a status such as
    "500" fails; "stall" and "reset" happen after half of the body; "silent" never answers; "short" ends early as if
    that were all; "flip" turns one bit.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, files: dict[str, bytes], ranges: bool = True) -> None:
        """``ranges``: whether it knows the header Range."""
        super().__init__(("127.0.0.1", 0), _WebHandler)
        self.files, self.ranges = files, ranges
        self.faults: dict[str, Iterator[str]] = {}
        self.requests: list[tuple[str, str | None]] = []
        """(path, Range) of each request."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.closing = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def fail(self, path: str, *words: str, forever: bool = False) -> None:
        """Set ``faults[path]``: these words, the last one again and again if ``forever``."""
        self.faults[path] = chain(words, repeat(words[-1])) if forever else iter(words)

    def gets(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)

    def __exit__(self, *args: Any) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _WebHandler(BaseHTTPRequestHandler):
    server: WebStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        with self.server.lock:
            self.server.requests.append((self.path, asked))
            fault = next(self.server.faults.get(self.path, iter(())), "")
        content = self.server.files.get(self.path)
        if fault.isdigit() or content is None:
            self.send_error(int(fault) if fault.isdigit() else 404)
        elif fault == "silent":
            self._hang_up()
        elif self.server.ranges and (span := re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")):
            start, end = int(span[1]), min(int(span[2]) + 1, len(content))
            if start >= len(content):
                self.send_error(416)
            else:
                self._answer(206, content[start:end], fault)
        else:
            self._answer(200, content, fault)

    def _answer(self, status: int, body: bytes, fault: str) -> None:
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        if fault == "short":
            body = body[:half]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault not in ("stall", "reset"):
            self.wfile.write(body)
            return
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault == "stall":
            self._hang_up()
        else:
            time.sleep(0.05)  # else the reset may overtake the headers
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def _hang_up(self) -> None:
        """Say nothing until the test ends."""
        self.server.closing.wait(60)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass
