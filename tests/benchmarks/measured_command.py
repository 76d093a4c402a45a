"""What a command costs: wall time, processor seconds, and the memory of its whole process tree.

Memory is sampled: the proportional set size (PSS) of every process of the command's session, so
that pages which processes share are counted once. A file mapped into memory counts while its pages
are resident, although the kernel may take them back: the anonymous part is kept beside the whole.
A peak shorter than the interval can be missed, but for the largest process alone: there the kernel
remembers (`VmHWM`; not `ru_maxrss`, which a process inherits from the one that started it). Linux
only.

python -m tests.benchmarks.measured_command --measurement cost.json -- sort chats.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts import files, log

SECONDS_BETWEEN_SAMPLES = 0.5
# The kernel walks every page to tell a PSS (10 ms for 400 MB): large trees are asked less often, so
# that asking takes at most so much of one core from what is measured.
SAMPLING_FRACTION = 0.04
KIB = 1024


@dataclass(frozen=True)
class Measurement:
    """One run of one command."""

    duration_seconds: float
    processor_seconds: float
    """User and system, of the command and of the processes it waited for."""
    peak_memory_bytes: int
    """Largest sum of PSS over the process tree."""
    peak_anonymous_memory_bytes: int
    """The same without pages of files."""
    peak_process_memory_bytes: int
    """Largest resident set that one process ever had, shared pages included."""
    n_samples: int


def measure(
    command: Sequence[object],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log_file: Path | None = None,
) -> Measurement:
    """Run a command to its end and say what it cost.

    Args:
        folder: to run it in; None is this process's.
        environment: variables to set beside those of this process.
        log_file: takes its stdout and stderr; None leaves them where they are.
    Raises:
        StageError: it ends with an exit code other than 0.
    """
    started = time.perf_counter()
    with open(log_file or os.devnull, "wb") as stream:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=stream if log_file else None,
            stderr=subprocess.STDOUT if log_file else None,
            # A session of its own: its processes are found even when their parent is gone.
            start_new_session=True,
        )
    samples = []
    try:
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            asked = time.perf_counter()
            samples.append(session_memory(process.pid))
            asking = time.perf_counter() - asked
            _wait(process.pid, max(SECONDS_BETWEEN_SAMPLES, asking / SAMPLING_FRACTION))
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    duration = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise log.StageError(
            "a measured command failed",
            where=log_file or " ".join(map(str, command)),
            found=f"exit code {process.returncode}{_last_lines(log_file)}",
            expected="exit code 0",
        )
    return Measurement(
        duration_seconds=duration,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_memory_bytes=max((memory.whole_bytes for memory in samples), default=0),
        peak_anonymous_memory_bytes=max((memory.anonymous_bytes for memory in samples), default=0),
        peak_process_memory_bytes=max(
            (memory.largest_process_bytes for memory in samples), default=0
        ),
        n_samples=len(samples),
    )


def _wait(process_id: int, seconds: float) -> None:
    """Until the process ends, at most so long; it stays to be waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return
        time.sleep(0.02)


def _last_lines(log_file: Path | None) -> str:
    if log_file is None:
        return ""
    return "\n" + "\n".join(log_file.read_text(errors="replace").splitlines()[-15:])


@dataclass(frozen=True)
class Memory:
    """Of the processes of a session, now."""

    whole_bytes: int
    anonymous_bytes: int
    largest_process_bytes: int
    """So far."""


def session_memory(session: int) -> Memory:
    """Sums of PSS, and the highest resident set."""
    whole = anonymous = largest = 0
    for folder in _session_processes(session):
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            lines += (folder / "status").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        kibibytes = {}
        for line in lines:
            key, _, text = line.partition(":")
            if text.endswith(" kB"):
                kibibytes[key] = int(text.split()[0])
        # A process that is ending has no memory left to tell of.
        whole += kibibytes.get("Pss", 0) * KIB
        anonymous += kibibytes.get("Pss_Anon", 0) * KIB
        largest = max(largest, kibibytes.get("VmHWM", 0) * KIB)
    return Memory(whole, anonymous, largest)


def _session_processes(session: int) -> Iterator[Path]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            # pid (name) state parent group session …: a name may hold spaces and parentheses.
            if int(stat.rpartition(")")[2].split()[3]) == session:
                yield folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--measurement", type=Path, required=True, help="to write: JSON")
    parser.add_argument("command", nargs="+", help="after --: the command and its arguments")
    arguments = parser.parse_args(argv)
    measurement = dataclasses.asdict(measure(arguments.command))
    files.write_json(arguments.measurement, measurement)
    print(log.fields(measurement), file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
