"""The server of releases in a separate process, as users start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPOSITORY


class Served(NamedTuple):
    """A running server."""

    address: str
    log: Path


@contextmanager
def serving(log: Path, *arguments: object, **environment: str) -> Iterator[Served]:
    """`with serving(log, release, "--draft", …) as served`, on a free port.

    Args:
        log: to write: the server's log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "workflow_scripts.serve.server", *map(str, arguments)]
    command += ["--port", str(port), "--threads", "1"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **environment}, stderr=stream
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process, log)
        yield Served(address, log)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/openapi.json", timeout=10)
            return
        except urllib.error.HTTPError as error:
            raise AssertionError(log.read_text()) from error
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())
