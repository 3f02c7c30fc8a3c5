"""A hub of models for tests: as much of the protocol as huggingface_hub and transformers need to list and download.

    with HubServer() as hub:
        hub.add("me/model", "step10-tokens1B", directory)
        hub.requests               # ["GET /api/models/me/model/refs", …]
        hub.refused.add("step10-tokens1B")  # or the name of a file: status 500; `gone`: 404
        hub.held.clear()                    # downloads of weights wait until it is set again
        hub.vanish()                        # the port is closed

Weights are served as the hub does those of LFS: by a redirect to where they are kept by their digest.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from local_http import LocalHttp

_LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class ServedFile:
    """One file of a revision."""

    name: str
    content: bytes = field(repr=False)

    @property
    def is_large(self) -> bool:
        """Whether it is kept in LFS."""
        return self.name.endswith(_LARGE)

    @property
    def blob_id(self) -> str:
        """As git names its content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.is_large else self.blob_id

    @property
    def lfs(self) -> dict[str, Any]:
        return {"oid": self.etag, "sha256": self.etag, "size": len(self.content), "pointerSize": 134}


@dataclass(frozen=True)
class ServedRevision:
    """A commit, and what is in it."""

    files: dict[str, ServedFile]

    @property
    def commit(self) -> str:
        names = "".join(f"{name} {file.etag}\n" for name, file in sorted(self.files.items()))
        return hashlib.sha1(names.encode()).hexdigest()


class HubServer:
    """Serves until the ``with`` ends."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, ServedRevision]] = {}
        """By repository and branch."""
        self.requests: list[str] = []
        """For models, in the order in which they came; also those that were refused."""
        self.refused: set[str] = set()
        self.gone: set[str] = set()
        self.held = threading.Event()
        self.held.set()

        class Handler(_Handler):
            served = self

        self._http = LocalHttp(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._is_open = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def add(self, repo_id: str, branch: str, directory: Path) -> ServedRevision:
        """A branch with the files of a directory and of those in it; or what is there now, if it is one already."""
        files = {
            str(path.relative_to(directory)): ServedFile(str(path.relative_to(directory)), path.read_bytes())
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        revision = self.models.setdefault(repo_id, {})[branch] = ServedRevision(files)
        return revision

    def vanish(self) -> None:
        """Close the port: connections are refused from now on."""
        if self._is_open:
            self._is_open = False
            self.held.set()
            self._http.shutdown()
            self._http.server_close()

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()


class _Handler(BaseHTTPRequestHandler):
    served: HubServer

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:1] != ["api"] or parts[:2] == ["api", "models"]:
            self.served.requests.append(f"{self.command} {unquote(url.path)}")
        if self.served.refused & {*parts}:
            self._send(500, b"this server was told to refuse")
        elif parts[0] == "lfs":
            self._send_large(parts[1], with_body)
        elif parts[:2] == ["api", "models"]:
            self._answer("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
        else:
            self._miss("RepoNotFound")

    def _answer(self, repo_id: str, asked: list[str], query: dict[str, list[str]]) -> None:
        branches = self.served.models.get(repo_id)
        if branches is None:
            self._miss("RepoNotFound")
            return
        if asked == ["refs"]:
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": revision.commit}
                for name, revision in branches.items()
            ]
            self._send_json({"branches": refs, "tags": [], "converts": []})
            return
        found = self._revision(repo_id, asked[1] if len(asked) > 1 else "main")
        if found is None:
            self._miss("RevisionNotFound")
        elif asked[:1] == ["tree"]:
            self._send_json([_tree_entry(file) for file in found.files.values()] if len(asked) == 2 else [])
        else:
            files = [_sibling(file, with_size="blobs" in query) for file in found.files.values()]
            self._send_json({"id": repo_id, "sha": found.commit, "siblings": files, "tags": [], "private": False})

    def _revision(self, repo_id: str, name: str) -> ServedRevision | None:
        branches = self.served.models.get(repo_id, {})
        if name in self.served.gone:
            return None
        return branches.get(name) or next((one for one in branches.values() if one.commit == name), None)

    def _resolve(self, repo_id: str, revision: str, name: str, with_body: bool) -> None:
        found = self._revision(repo_id, revision)
        if found is None:
            self._miss("RevisionNotFound" if repo_id in self.served.models else "RepoNotFound")
            return
        file = found.files.get(name)
        if file is None or name in self.served.gone:
            self._miss("EntryNotFound", {"X-Repo-Commit": found.commit})
            return
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{file.etag}"'}
        if file.is_large:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            elsewhere = self.served.url.replace("127.0.0.1", "localhost")  # within a host the client would follow
            self._send(302, b"", {**headers, "Location": f"{elsewhere}/lfs/{file.etag}"})
        else:
            self._send(200, file.content, headers, with_body)

    def _send_large(self, etag: str, with_body: bool) -> None:
        self.served.held.wait()
        files = (file for model in self.served.models.values() for one in model.values() for file in one.files.values())
        content = next(file.content for file in files if file.etag == etag)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self._send(206 if start else 200, content[start:], {"ETag": f'"{etag}"'}, with_body)

    def _miss(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, code.encode(), {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send_json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body and self.command == "GET":
                self.wfile.write(body)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """In the list of requests."""


def _sibling(file: ServedFile, *, with_size: bool) -> dict[str, Any]:
    if not with_size:
        return {"rfilename": file.name}
    sizes = {"rfilename": file.name, "size": len(file.content), "blobId": file.blob_id}
    return {**sizes, "lfs": file.lfs} if file.is_large else sizes


def _tree_entry(file: ServedFile) -> dict[str, Any]:
    entry = {"type": "file", "path": file.name, "size": len(file.content), "oid": file.blob_id}
    return {**entry, "lfs": file.lfs} if file.is_large else entry
