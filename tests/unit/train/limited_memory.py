"""`train_adapter` in a process with limited memory.

python -m tests.unit.train.limited_memory LIMIT_BYTES [options of train_adapter]

Linux allows it LIMIT_BYTES beyond what it has when training begins. With 0 there is no limit, and
the memory that it took is printed.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.train import train_adapter, training


def data_bytes() -> int:
    """Mapped private memory, as RLIMIT_DATA counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


class Watch(threading.Thread):
    """Measures the most memory mapped since its start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        before = data_bytes()
        while True:
            self.most = max(self.most, data_bytes() - before)
            time.sleep(0.002)


def main() -> None:
    limit_bytes = int(sys.argv[1])
    watch = Watch()
    train = training.train

    def limited(*arguments: object) -> None:
        if limit_bytes:
            most = data_bytes() + limit_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        else:
            watch.start()
        train(*arguments)

    training.train = limited
    train_adapter.main(sys.argv[2:])
    print(watch.most)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
