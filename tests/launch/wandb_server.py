"""A small stand-in for the W&B server, which cannot run here: enough of its protocol for the real ``wandb sync``.

It answers the GraphQL requests and the file stream and keeps what arrived. What it knows of the real server is in the
client's source and its tests of syncing: a run is resumed after the last ``_step`` of its history, the client appends
its lines at the number of rows that the server names, and a row of a ``_step`` that is there overwrites it.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FILE_STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream$")
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Run:
    """What arrived of one run."""

    project: str
    display_name: str = ""
    config: str = "{}"
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """``_step`` -> row."""
    arrived: list[dict[str, Any]] = field(default_factory=list)
    """Every row in the order of arrival, those that overwrote another one included."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    def shown(self, key: str) -> list[Any]:
        """The values of a metric in the order of ``_step``."""
        return [self.history[step][key] for step in sorted(self.history)]


class WandbServer(ThreadingHTTPServer):
    """The server of the runs in ``runs``, by id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, Run] = {}
        self.files: dict[str, bytes] = {}
        """Uploaded files, by name."""
        self.told: set[str] = set()
        """Every word of text that GraphQL requests brought: what the server is told about a run and its machine."""
        self.operations: list[str] = []
        """GraphQL operations in the order of arrival."""
        self.refused = ""
        """Requests to paths that begin with this are answered with HTTP status ``status``; "" refuses none."""
        self.status = 404
        self.delay = 0.0
        """Seconds before each answer."""
        self.answering = threading.Event()
        """Cleared, requests are taken and not answered until it is set again: a server that went away for a while."""
        self.answering.set()
        self.lock = threading.Lock()


@contextmanager
def wandb_server(delay: float = 0.0) -> Iterator[WandbServer]:
    """The server on loopback; each of its answers takes ``delay`` seconds."""
    with WandbServer() as server:
        server.delay = delay
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.answering.set()
            server.shutdown()
            thread.join()


@contextmanager
def unreachable(listening: bool) -> Iterator[str]:
    """The address of no server: connections are refused or, ``listening``, accepted and never answered."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listening:
            taken.listen(1000)  # the kernel accepts
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def environment_of(url: str, key: str = KEY) -> dict[str, str]:
    """Variables that send the client there."""
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": key, "no_proxy": "127.0.0.1"}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay)
        self.server.answering.wait()
        if self.server.refused and self.path.startswith(self.server.refused):
            return self._answer({"errors": [{"message": "refused"}]}, self.server.status)
        with self.server.lock:
            if self.path == "/graphql":
                request = json.loads(body)
                self._answer({"data": self._graphql(request["query"], request.get("variables") or {})})
            elif found := FILE_STREAM.search(self.path):
                self._stream(self.server.runs[found[3]], json.loads(body))
                self._answer({})
            else:
                self._answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.files[self.path.removeprefix("/storage/")] = body
        self._answer({})

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        operation = re.findall(r"(?:query|mutation)\s+(\w+)", query)[0]
        self.server.operations.append(operation)
        self.server.told.update(str(value) for value in given.values())
        answer = getattr(self, f"_{operation}", None)
        return answer(given) if answer else {}

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        viewer = {
            "id": "1",
            "entity": "clinic",
            "username": "clinic",
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"viewer": viewer}

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.get(given["name"])
        bucket = None
        if run is not None:
            bucket = self._bucket(given["name"], run) | {
                "summaryMetrics": json.dumps(run.summary),
                "logLineCount": 0,
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(run.history[step]) for step in sorted(run.history)[-1:]]),
                "eventsTail": "[]",
                "tags": [],
                "notes": "",
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"name": given["project"], "entity": {"name": "clinic"}, "bucket": bucket}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        new = given["name"] not in self.server.runs
        run = self.server.runs.setdefault(given["name"], Run(given["project"]))
        run.display_name = given.get("displayName") or run.display_name
        run.config = given.get("config") or run.config
        return {"upsertBucket": {"bucket": self._bucket(given["name"], run), "inserted": new}}

    def _bucket(self, name: str, run: Run) -> dict[str, Any]:
        project = {"id": "P", "name": run.project, "entity": {"id": "E", "name": "clinic"}}
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.display_name,
            "description": "",
            "config": run.config,
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.history),
        }

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.server.url}/storage/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _stream(self, run: Run, request: dict[str, Any]) -> None:
        rows = [json.loads(line) for line in request.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])]
        run.arrived.extend(rows)
        run.history.update((row["_step"], row) for row in rows)
        for line in request.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            run.summary = json.loads(line)
        if request.get("complete"):
            run.exit_codes.append(request["exitcode"])

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client ends without closing its connections
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # quiet
        pass
