"""S3-compatible storage on this machine: moto's server, spoken to over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket."""

    bucket: str
    client: Any
    """boto3's, for what tests put and look at."""

    def put(self, key: str, content: bytes) -> str:
        """An object; returns its URL."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return f"s3://{self.bucket}/{key}"

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What lies below a prefix, by key."""
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        keys = [item["Key"] for item in listed.get("Contents", [])]
        return {
            key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys
        }


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str = "chats") -> Iterator[S3Server]:
    """A server, and the environment in which Snakemake finds it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket=bucket)
        yield S3Server(bucket, client)
    finally:
        server.stop()
