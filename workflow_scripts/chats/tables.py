"""Arrow schemas of the tables that `clean_dataset` writes."""

from __future__ import annotations

import pyarrow as pa


def clean_schema() -> pa.Schema:
    """Return the schema of kept conversations; `messages` and `tools` have OpenAI's shape.

    The message of a plain text has the role `text`. Only an answer has a `weight`: null, 0 or 1.
    """
    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(call)),
            ("tool_call_id", pa.string()),
            ("name", pa.string()),
            ("weight", pa.int8()),
        ]
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.list_(message)),
            ("tools", pa.string()),  # JSON, because a tool's parameters are a schema of any shape
            ("references", pa.list_(pa.string())),  # right answers to the last question, or null
            ("n_copies", pa.int32()),  # times the conversation is seen per epoch
            ("corrections", pa.list_(pa.string())),
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
        ]
    )


def rejected_schema() -> pa.Schema:
    """Return the schema of rejected records: `RejectedRow`."""
    return pa.schema(
        [
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("raw", pa.string()),
        ]
    )
