"""Parallel work over processes or threads, with results in order and bounded memory.

`multiprocessing.Pool.imap` reads its whole input ahead, so a large file would end up in memory.
Here at most two items per process are read before their results are taken.
"""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each process uses one core; without these, every library in it would start a thread per core.
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    n_processes: int,
    initializer: Callable[..., None] | None = None,
    initial_arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield `map(function, items)`, computed by processes, in the items' order.

    With a single item or a single process the work is done in this process: starting others takes
    longer.

    Args:
        function, initializer: importable by name, because the processes are spawned.
        initializer: called once in each process with `initial_arguments`; it keeps what it loads in
            a variable of its module.
    Raises:
        Whatever `function` raises, when that item's result is due.
    """
    remaining = iter(items)
    first = list(itertools.islice(remaining, 2))
    if n_processes == 1 or len(first) < 2:
        if first and initializer is not None:
            initializer(*initial_arguments)
        for item in itertools.chain(first, remaining):
            yield _without_collecting(function, item)
        return
    # spawn, not fork: Arrow and OpenMP have started threads, and a fork copies their locks.
    pool = ProcessPoolExecutor(
        n_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(initializer, initial_arguments),
    )
    try:
        yield from ahead(
            pool,
            functools.partial(_without_collecting, function),
            itertools.chain(first, remaining),
            n_ahead=2 * n_processes,
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, n_ahead: int
) -> Iterator[Result]:
    """Yield `map(function, items)`, computed by a pool, in the items' order.

    Args:
        n_ahead: at most this many items are in progress, or done and not yet taken.
    Raises:
        Whatever `function` raises, when that item's result is due.
    """
    pending: collections.deque[Future[Result]] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= n_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _without_collecting(function: Callable[[Item], Result], item: Item) -> Result:
    """Call the function with garbage collection switched off.

    Garbage collection runs more often as objects accumulate; it took a quarter of the time of
    rendering and freed nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return function(item)
    finally:
        if was_enabled:
            gc.enable()


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    os.environ.update(SINGLE_THREAD)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    """End this process when its parent ends: a killed parent cannot stop its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
