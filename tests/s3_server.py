"""S3-compatible storage on this machine: moto's server, over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import pytest


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket."""

    bucket: str
    client: Any
    """boto3's client, for the objects that tests write and read."""
    refused: set[str] = field(default_factory=set)
    """Path suffixes that currently refuse writes."""

    def put(self, key: str, content: bytes) -> str:
        """Write an object and return its URL."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return f"s3://{self.bucket}/{key}"

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Key → content of the objects below a prefix."""
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        keys = [item["Key"] for item in listed.get("Contents", [])]
        return {
            key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys
        }


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str = "chats") -> Iterator[S3Server]:
    """A running server, and the environment variables with which Snakemake finds it."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Response

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = DomainDispatcherApplication(create_backend_app)
    refused: set[str] = set()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(tuple(refused)):
            denied = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            return Response(denied, 403, mimetype="application/xml")(environ, start_response)
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        # moto keeps its content per process, not per server.
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()
        monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket=bucket)
        yield S3Server(bucket, client, refused)
    finally:
        server.shutdown()
