from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workflow_scripts.parallel import ahead, map_in_order

_factor = 1


def set_factor(factor: int) -> None:
    global _factor
    _factor = factor


def multiplied_slowly(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0)  # later items are done before earlier ones
    return number * _factor, os.getpid()


def fails_at_five(number: int) -> int:
    if number == 5:
        raise ValueError("five")
    return number


@pytest.mark.parametrize("n_processes", [1, 3])
def test_results_come_in_the_order_of_the_items(n_processes):
    mapped = map_in_order(
        multiplied_slowly,
        range(40),
        n_processes=n_processes,
        initializer=set_factor,
        initial_arguments=(10,),
    )
    results, processes = zip(*mapped, strict=True)
    assert list(results) == [10 * number for number in range(40)]
    if n_processes == 1:
        assert set(processes) == {os.getpid()}
    else:
        assert os.getpid() not in processes


def test_a_single_item_starts_no_process():
    assert list(map_in_order(multiplied_slowly, [7], n_processes=8))[0][1] == os.getpid()


def test_without_items_there_are_no_results():
    assert list(map_in_order(multiplied_slowly, [], n_processes=2)) == []


def test_items_are_read_only_a_little_ahead_of_the_results():
    n_read = 0

    def items():
        nonlocal n_read
        for number in range(1000):
            n_read += 1
            yield number

    results = map_in_order(fails_at_five, items(), n_processes=2)
    for _ in range(3):
        next(results)
    assert n_read <= 3 + 2 * 2
    results.close()


@pytest.mark.parametrize("n_processes", [1, 2])
def test_an_error_is_raised_when_its_result_is_due(n_processes):
    results = map_in_order(fails_at_five, range(10), n_processes=n_processes)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)


def test_processes_end_when_their_parent_is_killed():
    script = (
        "import os\n"
        "from tests.unit.test_parallel import multiplied_slowly\n"
        "from workflow_scripts.parallel import map_in_order\n"
        "def endless():\n"
        "    number = 0\n"
        "    while True:\n"
        "        yield number\n"
        "        number += 1\n"
        "if __name__ == '__main__':\n"
        "    for _, process in map_in_order(multiplied_slowly, endless(), n_processes=2):\n"
        "        print(process, flush=True)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    processes = {int(parent.stdout.readline()) for _ in range(30)}
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)


def test_threads_work_a_bounded_number_of_items_ahead():
    n_read = 0

    def items():
        nonlocal n_read
        for number in range(40):
            n_read += 1
            yield number

    with ThreadPoolExecutor(3) as pool:
        results = ahead(pool, multiplied_slowly, items(), n_ahead=6)
        for number, (result, _) in enumerate(results):
            assert result == number * _factor
            assert n_read <= number + 6
