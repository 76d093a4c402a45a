"""Open a page in a browser: its screenshot, its network requests and its console messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Hosts of the browser's own requests (updates, time, accounts), which the switches do not all stop.
OWN_HOSTS = re.compile(r"https?://[\w.-]+\.(google|googleapis|gvt1)\.com/")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--metrics-recording-only", "--virtual-time-budget=5000",
)  # fmt: skip


class Seen(NamedTuple):
    """Result of opening a page."""

    screenshot: Path
    requests: list[str]
    """Addresses that the page requested from outside the file."""
    console: list[str]
    """Console messages of the page, including errors and refusals."""


def program() -> str | None:
    """A Chromium-like browser on this machine."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def see(page: Path, folder: Path, *, width: int = 1280, height: int = 2400) -> Seen:
    """Open a page from disk.

    Args:
        folder: for the screenshot and the browser's own files.
    """
    browser = program()
    assert browser
    network, picture = folder / "network.json", folder / f"{page.stem}.png"
    done = subprocess.run(
        [browser, *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={network}"]
        + [f"--window-size={width},{height}", f"--screenshot={picture}", "--enable-logging=stderr"]
        + [page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 and picture.is_file(), done.stderr
    console = re.findall(r"CONSOLE[:(].*", done.stderr)
    return Seen(picture, requests(network), console)


def requests(network: Path) -> list[str]:
    """Addresses of a net log, except files, blobs and data of the page itself."""
    text = network.read_text(encoding="utf-8").rstrip().rstrip(",")
    log = json.loads(text if text.endswith("}") else text + "]}")
    urls = {
        event["params"]["url"]
        for event in log["events"]
        if isinstance(event.get("params"), dict) and "url" in event["params"]
    }
    return sorted(
        url for url in urls if re.match("(https?|wss?|ftp):", url) and not OWN_HOSTS.match(url)
    )
