"""A W&B server for tests: what the real client asks of one, on this machine, kept in memory; it can be made to fail.

    with WandbServer() as server:
        subprocess.run(training, env={**os.environ, **server.environment})
        server.runs["…"].history       # the rows that were logged, with _step
        server.behaviour = "refuse"    # "hang", "ok"; server.vanish() closes the port

It speaks GraphQL (known operations, see `_ANSWERS`) and ``file_stream``, and takes uploaded files.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal
from urllib.parse import unquote

from local_http import LocalHttp

API_KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "me"

Behaviour = Literal["ok", "refuse", "hang", "deny"]
"""``"refuse"``: status 500; ``"hang"``: no answer until it is "ok" again, or the end; ``"deny"``: an unknown key."""


@dataclass
class ServedRun:
    """What the server was told of a run."""

    id: str
    project: str
    bucket: dict[str, Any] = field(default_factory=dict)
    """The variables of all ``UpsertBucket`` together."""
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Of ``file_stream``: by name of the file, such as ``wandb-history.jsonl``, and number of the line."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Uploaded, by name, such as ``media/images/…``."""
    exit_code: int | None = None
    """None: it has not ended."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged rows in their order."""
        return self._rows("wandb-history.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        """The last one that was sent."""
        rows = self._rows("wandb-summary.json")
        return rows[-1] if rows else {}

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get(name, {}).items())]


class WandbServer:
    """Serves until the ``with`` ends.

    Args:
        projects: that exist, ``"me/project"``; a run makes its own.
    """

    def __init__(self, *projects: str) -> None:
        self.projects = set(projects)
        self.runs: dict[str, ServedRun] = {}
        self.views: list[dict[str, Any]] = []
        """The variables of each ``UpsertView2``."""
        self.alerts: list[dict[str, Any]] = []
        self.requests: list[str] = []
        """GraphQL operations and paths, in the order in which they came; also those that were not answered."""
        self._behaviour: Behaviour = "ok"
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._lock = threading.Lock()

        class Handler(_Handler):
            served = self

        self._http = LocalHttp(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._is_open = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process log to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online", "WANDB_ENTITY": ENTITY}

    @property
    def behaviour(self) -> Behaviour:
        return self._behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        (self._goes_on.clear if behaviour == "hang" else self._goes_on.set)()

    def vanish(self) -> None:
        """Close the port: connections are refused from now on, and those that are open are cut."""
        if self._is_open:
            self._is_open = False
            self._goes_on.set()
            self._http.shutdown()
            self._http.server_close()

    @property
    def is_open(self) -> bool:
        """Whether it has not vanished."""
        return self._is_open

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()

    def wait(self) -> None:
        """As long as it hangs."""
        self._goes_on.wait()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to an operation: ``data``, or ``errors`` for one that is not known."""
        with self._lock:
            named = re.search(r"(?:query|mutation)\s+(\w+)", query)
            name = named.group(1) if named else ""
            self.requests.append(name)
            answer = _ANSWERS.get(name)
            if answer is None:
                return {"errors": [{"message": f"this server does not know the operation {name!r}"}]}
            try:
                return {"data": answer(self, variables)}
            except Refused as refused:
                return {"data": None, "errors": [{"message": str(refused)}]}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """What ``file_stream`` brings: lines of files from an offset on, and the end of the run."""
        with self._lock:
            run = self.runs[run_id]
            for name, part in sent.get("files", {}).items():
                lines = run.lines.setdefault(name, {})
                lines.update(enumerate(part["content"], start=part["offset"]))
            if sent.get("complete"):
                run.exit_code = sent.get("exitcode", 0)


class Refused(Exception):
    """An error in the words of the server."""


def _project(server: WandbServer, entity: str | None, project: str | None) -> dict[str, Any]:
    entity = entity or ENTITY
    owner = {"id": f"entity-{entity}", "name": entity}
    return {
        "__typename": "Project",
        "id": f"project-{project}",
        "internalId": "1",
        "name": project,
        "entityName": entity,
        "entity": owner,
        "createdAt": "2026-01-01T00:00:00Z",
        "isBenchmark": False,
        "user": None,
    }


def _viewer(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    teams = {"edges": [{"node": {"id": "team", "name": ENTITY}}]}
    return {
        "viewer": {
            "id": "user", "name": ENTITY, "username": ENTITY, "entity": ENTITY, "email": "me@example.org",
            "admin": False, "flags": "{}", "deletedAt": None, "apiKeys": {"edges": []}, "teams": teams,
        }
    }  # fmt: skip


def _upsert_bucket(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run_id, project = variables["name"], variables["project"]
    is_new = run_id not in server.runs
    server.projects.add(f"{variables.get('entity') or ENTITY}/{project}")
    run = server.runs.setdefault(run_id, ServedRun(run_id, project))
    run.bucket |= {name: value for name, value in variables.items() if value is not None}
    return {"upsertBucket": {"bucket": _bucket(server, run), "inserted": is_new}}


def _bucket(server: WandbServer, run: ServedRun) -> dict[str, Any]:
    history, events = (
        [line for _, line in sorted(run.lines.get(f"wandb-{name}.jsonl", {}).items())] for name in ("history", "events")
    )
    config = json.loads(run.bucket.get("config") or "{}")
    return {
        "id": f"bucket-{run.id}",
        "name": run.id,
        "displayName": run.bucket.get("displayName") or run.id,
        "description": None,
        "config": json.dumps(config),
        "wandbConfig": json.dumps({"t": config.get("_wandb", {}).get("value", {}).get("t", {})}),
        "sweepName": None,
        "project": _project(server, run.bucket.get("entity"), run.project),
        "historyLineCount": len(history),
        "eventsLineCount": len(events),
        "logLineCount": len(run.lines.get("output.log", {})),
        "historyTail": json.dumps(history[-1:]),
        "eventsTail": json.dumps(events[-1:]),
        "summaryMetrics": json.dumps(run.summary),
        "tags": run.bucket.get("tags") or [],
        "notes": run.bucket.get("notes"),
        "state": "running" if run.exit_code is None else "finished",
    }


def _resume_status(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run = server.runs.get(variables["name"])
    bucket = None if run is None else _bucket(server, run)
    return {"model": {**_project(server, variables.get("entity"), variables.get("project")), "bucket": bucket}}


def _create_run_files(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run = variables["run"]
    files = [{"name": name, "uploadUrl": f"{server.url}/upload/{run}/{name}"} for name in variables["files"]]
    return {"createRunFiles": {"runID": f"bucket-{run}", "uploadHeaders": [], "files": files}}


def _upsert_view(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    _must_exist(server, variables["entityName"], variables["projectName"])
    server.views.append(variables)
    view_id = variables.get("id") or f"view-{len(server.views)}"
    view = {"id": view_id, "name": variables["name"]}
    return {"upsertView": {"view": view, "inserted": "id" not in variables}}


def _must_exist(server: WandbServer, entity: str, project: str) -> None:
    if f"{entity}/{project}" not in server.projects:
        raise Refused(f"project {entity}/{project} not found")


def _find_project(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    entity = variables.get("entity") or variables.get("entityName")
    name = variables.get("name") or variables.get("project")
    return {"project": _project(server, entity, name) if f"{entity}/{name}" in server.projects else None}


def _alert(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    server.alerts.append(variables)
    return {"notifyScriptableRunAlert": {"success": True}}


_ANSWERS: dict[str, Callable[[WandbServer, dict[str, Any]], dict[str, Any]]] = {
    "Viewer": _viewer,
    "GetViewer": _viewer,
    "ServerFeaturesQuery": lambda server, variables: {"serverInfo": {"features": []}},
    "UpsertBucket": _upsert_bucket,
    "RunResumeStatus": _resume_status,
    "CreateRunFiles": _create_run_files,
    "MarkRunFilesUploaded": lambda server, variables: {"markRunFilesUploaded": {"success": True}},
    "NotifyScriptableRunAlert": _alert,
    "UpsertView2": _upsert_view,
    "GetProject": _find_project,
    "XXHashDigestsEnabled": lambda server, variables: {"entity": {"xxhashDigestsEnabled": False}},
}


class _Handler(BaseHTTPRequestHandler):
    served: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if not self._behaves():
            return
        if self.path == "/graphql":
            asked = json.loads(body)
            self._answer(200, self.served.graphql(asked["query"], asked.get("variables") or {}))
            return
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if stream is None:
            self._answer(404, {"error": f"there is nothing at {self.path}"})
            return
        self.served.requests.append("file_stream")
        self.served.stream(unquote(stream.group(1)), json.loads(body))
        self._answer(200, {})

    def do_PUT(self) -> None:
        body = self._body()
        if not self._behaves():
            return
        _, _, run, name = unquote(self.path).split("/", 3)
        self.served.requests.append(f"PUT {name}")
        self.served.runs[run].files[name] = body
        self._answer(200, {})

    def do_GET(self) -> None:
        if self._behaves():
            self._answer(404, {"error": f"there is nothing at {self.path}"})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _behaves(self) -> bool:
        """Whether the request is to be answered as it should be; if not, it has been."""
        if self.served.behaviour == "hang":
            self.served.requests.append(f"hangs: {self.path}")
            self.served.wait()
        if not self.served.is_open:
            self.close_connection = True
            return False
        if self.served.behaviour == "refuse":
            self.served.requests.append(f"refused: {self.path}")
            self._answer(500, {"error": "this server was told to refuse"})
        if self.served.behaviour == "deny":
            self._answer(401, {"error": "user is not logged in"})
        return self.served.behaviour not in ("refuse", "deny")

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """In the list of requests."""
