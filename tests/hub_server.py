"""A Hugging Face Hub on this machine: the part of its HTTP interface that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NOBODY_LISTENS = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Repository:
    """A repository: commits by id, and the names that point to them."""

    commits: Mapping[str, Mapping[str, bytes]]
    """Commit → path → content."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Branches and tags → commit; by default `main` is the first commit."""
    is_gated: bool = False

    def commit(self, revision: str) -> str | None:
        names = {"main": next(iter(self.commits)), **self.names}
        revision = names.get(revision, revision)
        return revision if revision in self.commits else None


@dataclass
class Hub:
    address: str
    requests: list[str]
    """Requested paths, in order."""


def environment(endpoint: str, *, offline: bool = False) -> dict[str, str]:
    """Environment variables with which a process reaches that Hub and no other."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@contextmanager
def serving(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """A Hub with repositories: `models/owner/name` and `datasets/owner/name`."""
    requests: list[str] = []
    handler = type(
        "Handler", (_Handler,), {"repositories": dict(repositories), "requests": requests}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", requests)
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Mapping[str, Repository]
    requests: list[str]

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.requests.append(self.path)
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        elif parts[0] == "datasets":
            kind, name, rest = "datasets", "/".join(parts[1:3]), parts[3:]
        else:
            kind, name, rest = "models", "/".join(parts[:2]), parts[2:]
        repository = self.repositories.get(f"{kind}/{name}")
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        action, revision, *path = [*rest, "", ""][:2] + rest[2:]
        if repository.is_gated and (kind == "models" or action in ("resolve", "auth-check")):
            return self.refuse(403, "GatedRepo")
        commit = repository.commit(revision or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        served = repository.commits[commit]
        match action:
            case "" | "revision":
                siblings = [
                    {"rfilename": path, "size": len(content)} for path, content in served.items()
                ]
                gated = "auto" if repository.is_gated else False
                self.json({"id": name, "sha": commit, "gated": gated, "siblings": siblings})
            case "tree":
                self.json(_tree(served, "/".join(path)))
            case "paths-info":
                paths = parse_qs(body)["paths"] if "=" in body else json.loads(body)["paths"]
                self.json([entry for entry in _tree(served, None) if entry["path"] in paths])
            case "resolve":
                self.file(served.get("/".join(path)), commit)
            case _:
                self.refuse(404, "RepoNotFound")

    do_HEAD = do_POST = do_GET

    def file(self, content: bytes | None, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if content is None:
            return self.refuse(404, "EntryNotFound", headers)
        self.reply(200, {**headers, "ETag": f'"{_blob_id(content)}"'}, content)

    def json(self, content: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, {**(headers or {}), "X-Error-Code": code}, b"{}")

    def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _tree(served: Mapping[str, bytes], folder: str | None) -> list[dict[str, object]]:
    """All files and folders below a folder; everything for None or the root."""
    prefix = f"{folder}/" if folder else ""
    folders = {path.rpartition("/")[0] for path in served} - {""}
    entries = [
        {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
        for path, content in served.items()
    ]
    entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
    return [entry for entry in entries if str(entry["path"]).startswith(prefix)]


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
