"""Recognizing that memory ran out, from torch's allocators to bitsandbytes."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler

# Messages of errors without a specific type: torch's CPU allocator, memory-mapped files, C++,
# bitsandbytes and cuBLAS.
NO_MEMORY = re.compile(
    "t allocate memory|Cannot allocate memory|bad_alloc|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)


def exhausts_memory(error: BaseException) -> bool:
    """True if the error means that GPU or CPU memory ran out."""
    import torch  # 2 s that the --help of programs, which import this function, must not wait for

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


@contextmanager
def of_loading() -> Iterator[None]:
    """Find out whether loading by transformers failed because memory ran out.

    transformers 5.x logs a table with the error and traceback of each weight, and raises an error
    that does not mention memory (`log_conversion_errors`).

    Raises:
        MemoryError: memory ran out; the message is that line of the table, which is not logged.
    """
    logger = logging.getLogger("transformers")
    held = BufferingHandler(capacity=sys.maxsize)
    # With CI=true, transformers also passes records to the root logger's handlers.
    handlers, propagates = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [held], False
    try:
        yield
    except RuntimeError as error:
        text = "\n".join(record.getMessage() for record in held.buffer)
        found = [line.strip() for line in text.splitlines() if NO_MEMORY.search(line)]
        if exhausts_memory(error) or not found:
            raise
        held.buffer.clear()
        raise MemoryError(found[0]) from None
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        for record in held.buffer:
            logger.handle(record)
