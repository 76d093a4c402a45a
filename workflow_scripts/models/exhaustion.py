"""Memory that ends: what says so, from torch's allocators to bitsandbytes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

# What errors say that have no type of their own: torch's CPU allocator, a file that is mapped,
# C++, bitsandbytes and cuBLAS.
NO_MEMORY = re.compile(
    "t allocate memory|Cannot allocate memory|bad_alloc|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)


def exhausts_memory(error: BaseException) -> bool:
    """The GPU's allocator, the CPU's, or Python's own had nothing left."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


@contextmanager
def of_loading() -> Iterator[None]:
    """While transformers loads weights: it keeps each weight's error for a table that it logs, with
    a traceback each, and raises another, which says nothing of memory (`log_conversion_errors` of
    5.x).

    Raises:
        MemoryError: one of those errors was of memory; its line. The table is left out then.
    """
    logger = logging.getLogger("transformers")
    held = _Held()
    # Not to the root's handlers either: with CI=true transformers lets it through to them.
    handlers, propagates = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [held], False
    try:
        yield
    except RuntimeError as error:
        found = [] if exhausts_memory(error) else held.lines_of_memory()
        if not found:
            raise
        held.records.clear()
        raise MemoryError(found[0]) from None
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        for record in held.records:
            logger.handle(record)


class _Held(logging.Handler):
    """Keeps records back."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines_of_memory(self) -> list[str]:
        text = "\n".join(record.getMessage() for record in self.records)
        return [line.strip() for line in text.splitlines() if NO_MEMORY.search(line)]
