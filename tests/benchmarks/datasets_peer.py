"""The peer: chats to token ids and labels with `datasets.map` around mistral-common.

What a careful user writes by hand today: the same library, called as its documentation shows, its
calls spread over processes by datasets.

python -m tests.benchmarks.datasets_peer --chats chats.jsonl --tokenizer tokenizer.model.v3
    --processes 2 --out tokens/
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

IGNORED = -100  # a label that the loss leaves out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=Path, required=True, help="JSON Lines with `messages`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Mistral's tokenizer file")
    parser.add_argument("--processes", type=int, required=True, help="of datasets.map")
    parser.add_argument("--out", type=Path, required=True, help="to write: a saved dataset")
    arguments = parser.parse_args(argv)

    from datasets import load_dataset

    chats = load_dataset("json", data_files=str(arguments.chats), split="train")
    documents = chats.map(
        encode,
        batched=True,
        num_proc=arguments.processes,
        remove_columns=chats.column_names,
        fn_kwargs={"tokenizer_file": str(arguments.tokenizer)},
    )
    documents.save_to_disk(str(arguments.out))


def encode(batch: dict[str, list[Any]], tokenizer_file: str) -> dict[str, list[list[int]]]:
    """Token ids and labels of a batch; answers with their EOS are supervised."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    tokenizer = _tokenizer(tokenizer_file)
    instruct: Any = tokenizer.instruct_tokenizer
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for messages in batch["messages"]:
        request = ChatCompletionRequest.from_openai(messages=messages)
        input_ids = tokenizer.encode_chat_completion(request).tokens
        columns["input_ids"].append(input_ids)
        columns["labels"].append(
            answers_alone(input_ids, start=instruct.END_INST, end=instruct.tokenizer.eos_id)
        )
    return columns


@functools.cache  # once a process: it takes seconds and cannot be sent to another
def _tokenizer(path: str) -> MistralTokenizer:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)


def answers_alone(input_ids: list[int], *, start: int, end: int) -> list[int]:
    """The token ids after each `[/INST]` up to EOS, both excluded and included; else ignored."""
    labels, in_answer = [], False
    for token in input_ids:
        labels.append(token if in_answer else IGNORED)
        if token == start:
            in_answer = True
        elif token == end:
            in_answer = False
    return labels


if __name__ == "__main__":
    main()
