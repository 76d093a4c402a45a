"""Gate: the tokens of training are what the tokenizer that ships makes of the same conversations.

Three ways to the same ids: the file under judgement; mistral-common, asked again; and the exported
`tokenizer.json` with its chat template, through transformers, as a user of the model would call it.
Conversations whose text spells a control token (`[INST]`) are compared with mistral-common alone
and
counted: as text they are harmless there, and no text template can say so.

python -m workflow_scripts.data.check_tokens --clean clean/ --tokens tokens/ --tokenizer tokenizer/
    --check tokens/check.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.data.documents import SPLITS, Documents
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

OUTPUT_VERSION = 1
logger = log.stage_logger("check_tokens")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean_dataset")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of render_chats")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)

    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from transformers import AutoTokenizer

    official = load_mistral_tokenizer(arguments.tokenizer, for_training=True)
    shipped = AutoTokenizer.from_pretrained(arguments.tokenizer)
    eos_id = official.instruct_tokenizer.tokenizer.eos_id
    control = sorted(
        token.content for token in shipped.added_tokens_decoder.values() if token.special
    )
    n_compared = n_control_text = 0
    for split in SPLITS:
        chats = files.read_parquet(arguments.clean / f"{split}.parquet").to_pylist()
        messages_by_id = {chat["id"]: chat["messages"] for chat in chats}
        documents = Documents(arguments.tokens / f"{split}.arrow")
        for document in log.progress(documents, logger, total=len(documents), unit="documents"):
            messages = messages_by_id[document.id]
            found = document.input_ids.tolist()
            request = ChatCompletionRequest.from_openai(messages=messages)
            where = f"{arguments.tokens / split}.arrow, conversation {document.id}"
            compare(found, official.encode_chat_completion(request).tokens, where, "mistral-common")
            if any(token in message["content"] for token in control for message in messages):
                n_control_text += 1
            else:
                rendered = shipped.apply_chat_template(messages, tokenize=True, return_dict=False)
                compare(found, rendered, where, "tokenizer.json and chat_template.jinja")
            closes = [
                bool(document.is_supervised[at])
                for at, token in enumerate(found)
                if token == eos_id
            ]
            if not closes or not all(closes):
                raise StageError("an answer's closing EOS is not supervised", where=where)
            n_compared += 1
    report = {"n_conversations": n_compared, "n_with_control_token_text": n_control_text}
    files.write_json(arguments.check, report)
    logger.info("passed %s", log.fields(report))


def compare(found: list[int], expected: list[int], where: str, reference: str) -> None:
    """Raise where two renderings differ, naming the first token that does."""
    if found == expected:
        return
    at = next(
        (
            position
            for position, pair in enumerate(zip(found, expected, strict=False))
            if pair[0] != pair[1]
        ),
        min(len(found), len(expected)),
    )
    raise StageError(
        f"tokens differ from those of {reference}",
        where=f"{where}, token {at}",
        found=found[at : at + 8],
        expected=expected[at : at + 8],
        to_fix="check that the checkpoint's tokenizer files belong together",
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
