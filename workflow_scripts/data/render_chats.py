"""Render conversations to token ids with mistral-common, and mark what training may learn from.

Answers are supervised with their closing EOS; questions, system prompts and control tokens are not.

python -m workflow_scripts.data.render_chats --clean clean/ --tokenizer tokenizer/ --settings '{}'
    --tokens tokens/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.data.documents import SPLITS, check_rejected, documents_schema
from workflow_scripts.data.rendering import CannotRender, Renderer
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import RenderingSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("render_chats")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean_dataset")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--settings", required=True, help="JSON of `datasets.<name>.rendering`")
    parser.add_argument("--tokens", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(RenderingSettings, arguments.settings)

    import pyarrow as pa

    logger.info("started %s settings=%s", log.versions("mistral-common"), arguments.settings)
    renderer = Renderer(load_mistral_tokenizer(arguments.tokenizer, for_training=True))
    rejected: list[dict[str, str]] = []
    n_read = 0
    for split in SPLITS:
        rows = []
        chats = files.read_parquet(arguments.clean / f"{split}.parquet").to_pylist()
        n_read += len(chats)
        for chat in log.progress(chats, logger, total=len(chats), unit="conversations"):
            try:
                rendering = renderer.render(chat["messages"])
                limit = settings.max_document_tokens
                if limit is not None and len(rendering.input_ids) > limit:
                    raise CannotRender(f"{len(rendering.input_ids)} tokens, at most {limit} wanted")
            except CannotRender as reason:
                where = f"{chat['source_file']}:{chat['source_line']}"
                rejected.append({"id": chat["id"], "where": where, "reason": str(reason)})
                continue
            spans = rendering.supervised_spans
            rows.append(
                {
                    "id": chat["id"],
                    "input_ids": rendering.input_ids,
                    "supervised_spans": [position for span in spans for position in span],
                    "n_tokens": len(rendering.input_ids),
                    "n_supervised_tokens": sum(end - start for start, end in spans),
                }
            )
        files.write_arrow(
            arguments.tokens / f"{split}.arrow",
            pa.Table.from_pylist(rows, schema=documents_schema()),
        )
        logger.info(
            "rendered split=%s n_documents=%d n_tokens=%d n_supervised_tokens=%d",
            split,
            len(rows),
            sum(row["n_tokens"] for row in rows),
            sum(row["n_supervised_tokens"] for row in rows),
        )
    check_rejected(
        [f"{row['where']}: {row['reason']}" for row in rejected],
        logger,
        n_read=n_read,
        limit=settings.max_rejected_fraction,
        key="datasets.<name>.rendering.max_rejected_fraction",
    )
    schema = pa.schema([("id", pa.string()), ("where", pa.string()), ("reason", pa.string())])
    files.write_parquet(
        arguments.tokens / "rejected.parquet", pa.Table.from_pylist(rejected, schema=schema)
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
