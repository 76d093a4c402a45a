"""A Hugging Face Hub on this machine that accepts uploads: repositories, LFS, commits, over HTTP.

It has the part of the interface that huggingface_hub uses to create a repository and commit files
without Xet. Like the real Hub it checks who may write, the YAML of the model card, and the hash and
size of every object.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

LFS_SUFFIXES = (".gguf", ".model", ".safetensors")


@dataclass
class Uploaded:
    """The content of a repository after its commits."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs_paths: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    """Messages of the commits."""


@dataclass
class Hub:
    token: str
    """The token that may write to `owner`."""
    owner: str
    address: str = ""
    repositories: dict[str, Uploaded] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by sha256."""
    requests: list[str] = field(default_factory=list)
    fails_after: int | None = None
    """Objects that are stored before storage fails; None means it never fails."""


@contextmanager
def serving(token: str, owner: str) -> Iterator[Hub]:
    hub = Hub(token, owner)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        body = self.body()
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
            return self.preupload("/".join(parts[2:4]), json.loads(body))
        if parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
            return self.commit("/".join(parts[2:4]), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        self.answer(404, {"error": "Not Found"})

    def do_GET(self) -> None:
        """Describe a repository."""
        self.hub.requests.append(f"GET {self.path}")
        name = "/".join(urlsplit(self.path).path.strip("/").split("/")[2:4])
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.answer(404, {"error": "Repository not found"})
        siblings = [{"rfilename": path} for path in repository.files]
        sha = f"{len(repository.commits):040x}"
        self.answer(200, {"id": name, "sha": sha, "siblings": siblings})

    def do_PUT(self) -> None:
        """Store an object: a signed address, without a token."""
        content = self.body()
        assert "Authorization" not in self.headers
        oid = self.path.rsplit("/", 1)[1]
        self.hub.requests.append("PUT object")
        if self.hub.fails_after is not None and len(self.hub.objects) >= self.hub.fails_after:
            return self.answer(403, {"error": "storage is out of order"})
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "hash mismatch"})
        self.hub.objects[oid] = content
        self.answer(200, {})

    def validate(self, body: dict[str, Any]) -> None:
        front = body["content"].split("---\n")[1]
        data = yaml.safe_load(front)
        errors = []
        # The Hub's own messages.
        for key in ("base_model", "license", "language"):
            if key in data and not isinstance(data[key], (str, list)):
                errors.append({"message": f'"{key}" must be a string or an array'})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body: dict[str, Any]) -> None:
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] != self.hub.owner:
            return self.answer(403, {"error": "You don't have the rights to create a model there"})
        if name in self.hub.repositories:
            return self.answer(
                409, {"error": "You already created this repo", "url": f"{self.hub.address}/{name}"}
            )
        self.hub.repositories[name] = Uploaded(body.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.address}/{name}"})

    def preupload(self, name: str, body: dict[str, Any]) -> None:
        there = self.hub.repositories[name].files
        answers = []
        for one in body["files"]:
            path, is_lfs = one["path"], one["path"].endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular"}
            answer["shouldIgnore"] = False
            if path in there:
                answer["oid"] = _oid(there[path], is_lfs=is_lfs)
            answers.append(answer)
        self.answer(200, {"files": answers})

    def batch(self, body: dict[str, Any]) -> None:
        objects = []
        for one in body["objects"]:
            answer = dict(one)
            if one["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.address}/store/{one['oid']}"}}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    assert value["encoding"] == "base64"
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.hub.objects[value["oid"]]
                    assert len(content) == value["size"]
                    repository.files[value["path"]] = content
                    repository.lfs_paths.add(value["path"])
                case other:
                    raise AssertionError(other)
        number = f"{len(repository.commits):040x}"
        self.answer(
            200, {"commitUrl": f"{self.hub.address}/{name}/commit/{number}", "commitOid": number}
        )

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes, *, is_lfs: bool) -> str:
    """The id of a file in git: the hash of its blob or, for an LFS file, its sha256."""
    if is_lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
