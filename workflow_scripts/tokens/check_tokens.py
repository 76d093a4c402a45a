"""Gate: the training tokens equal those that the exported tokenizer gives for the conversations.

The token ids in the file are compared with two references: mistral-common, with validation and
without our cache; and the exported `tokenizer.json` with its chat template, called through
transformers as a user of the model would. The official templates differ from mistral-common in a
few cases. Conversations with such a case are compared with mistral-common only, and the report
counts them by case.

python -m workflow_scripts.tokens.check_tokens --clean clean/ --tokens tokens/
    --tokenizer tokenizer/ --settings '{"n_conversations": 1000}' --check tokens/check.json
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_scripts import log
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.handover.tokens import TokensCheck
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import TokensGateSettings, settings_from_json
from workflow_scripts.tokens import token_parity
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.tokens.token_parity import Chat

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

OUTPUT_VERSION = 3
# The last control token of a prompt, in every version of the tokenizer.
PROMPT_ENDS = ("[/INST]", "[/TOOL_RESULTS]")
PROMPT_END_TOKENS = 16  # decoded to find it; v1 writes it as several tokens
SHOWN_TOKENS = 12
RENDER_AGAIN = "delete the tokens and render again; if the error stays, please report it"
TO_FIX = "check that the checkpoint's tokenizer files belong together"
logger = log.stage_logger("check_tokens")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean_dataset")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of render_chats")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates.tokens`")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    limit = settings_from_json(TokensGateSettings, arguments.settings).n_conversations

    judge = Judge(arguments.tokenizer)
    documents = {split: Documents(arguments.tokens / f"{split}.arrow") for split in SPLITS}
    shares = share_out([len(documents[split]) for split in SPLITS], limit)
    for split, share in zip(SPLITS, shares, strict=True):
        chats = token_parity.sample(arguments.clean / f"{split}.parquet", documents[split], share)
        where = f"{arguments.tokens / split}.arrow"
        for chat in log.progress(chats, logger, total=share, unit="documents"):
            judge.compare(chat, f"{where}, conversation {chat.document.id}")
    check = judge.check(n_documents=sum(map(len, documents.values())))
    check.write(arguments.check)
    logger.info("passed %s", log.fields(check.content()))


class Judge:
    """Compares documents with both references and counts them.

    Args:
        tokenizer: folder of `export_tokenizer`.
    """

    def __init__(self, tokenizer: Path) -> None:
        from transformers import AutoTokenizer  # heavy: not for --help

        self._official: MistralTokenizer = load_mistral_tokenizer(tokenizer, for_training=True)
        # transformers annotates its methods with unions of everything that they may return.
        self._shipped: Any = AutoTokenizer.from_pretrained(tokenizer)
        self._eos_id = self._official.instruct_tokenizer.tokenizer.eos_id
        control = (token.content for token in self._shipped.added_tokens_decoder.values())
        self._control = re.compile("|".join(map(re.escape, control)))
        self._n_conversations = self._n_with_tools = self._n_by_template = 0
        self._reasons: Counter[str] = Counter()

    def compare(self, chat: Chat, where: str) -> None:
        """Compare one document with the references.

        Raises:
            StageError: the document differs from a reference, or its supervised tokens are wrong.
        """
        found = chat.document.input_ids.tolist()
        expected = token_parity.official_tokens(self._official, chat.messages, chat.tools)
        self._compare(found, expected, "mistral-common", where)
        self._check_supervision(chat, found, where)
        self._n_conversations += 1
        self._n_with_tools += chat.uses_tools
        reason = self._why_not_by_template(chat)
        if reason is not None:
            self._reasons[reason] += 1
            return
        rendered = self._by_template(chat)
        self._compare(found, rendered, "tokenizer.json and chat_template.jinja", where)
        self._n_by_template += 1

    def check(self, *, n_documents: int) -> TokensCheck:
        """Return the counts, given the number of documents in all splits."""
        reasons = sorted(self._reasons.items(), key=lambda item: (-item[1], item[0]))
        return TokensCheck(
            n_documents=n_documents,
            n_conversations=self._n_conversations,
            n_with_tools=self._n_with_tools,
            n_compared_with_template=self._n_by_template,
            n_compared_with_mistral_common_alone=dict(reasons),
        )

    def _compare(self, found: list[int], expected: list[int], reference: str, where: str) -> None:
        token_parity.compare(
            found,
            expected,
            what=f"tokens differ from those of {reference}",
            where=where,
            decode=self._decode,
            to_fix=TO_FIX,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._shipped.decode(token_ids, skip_special_tokens=False)

    def _why_not_by_template(self, chat: Chat) -> str | None:
        texts = token_parity.texts_of(chat.messages, chat.tools)
        if any(map(self._control.search, texts)):
            return "a control token spelled out"
        return token_parity.why_template_differs(chat.messages, chat.tools, official=self._official)

    def _by_template(self, chat: Chat) -> list[int]:
        if token_parity.is_text(chat.messages):
            return [*self._shipped(chat.messages[0]["content"]).input_ids, self._eos_id]
        messages, tools = token_parity.template_arguments(chat.messages, chat.tools)
        return self._shipped.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=False
        )

    def _check_supervision(self, chat: Chat, found: list[int], where: str) -> None:
        """Check that supervised tokens are whole answers with EOS, of all turns or of the last."""
        closes = [
            bool(chat.document.is_supervised[at])
            for at, token in enumerate(found)
            if token == self._eos_id
        ]
        version = self._official.version.value
        answers = token_parity.learnable_answers(chat.messages, version=version)
        of_all_turns = [may_be_learned for may_be_learned, _ in answers]
        of_last_turn = [may_be_learned and is_last for may_be_learned, is_last in answers]
        if closes not in (of_all_turns, of_last_turn) or not any(closes):
            raise StageError(
                "the supervision of an answer's closing EOS does not follow the answer's weight",
                where=where,
                found=closes,
                expected=f"{of_all_turns}, or {of_last_turn} if only the last turn is supervised",
                to_fix=RENDER_AGAIN,
            )
        is_text = token_parity.is_text(chat.messages)
        for start, end in supervised_runs(chat.document.is_supervised):
            # In a plain text only BOS comes before.
            is_whole = start == 1 if is_text else self._ends_a_prompt(found[:start])
            if is_whole and found.index(self._eos_id, start) == end - 1:
                continue
            raise StageError(
                "supervised tokens are not exactly one answer",
                where=f"{where}, tokens {start} to {end - 1}",
                found=f"…{self._decode(found[max(0, start - 4) : start])!r} before"
                f" {self._decode(found[start:end][:SHOWN_TOKENS])!r}…",
                expected="from the end of its question to its closing EOS",
                to_fix=RENDER_AGAIN,
            )

    def _ends_a_prompt(self, token_ids: Sequence[int]) -> bool:
        return self._decode(token_ids[-PROMPT_END_TOKENS:]).rstrip().endswith(PROMPT_ENDS)


def supervised_runs(is_supervised: np.ndarray) -> list[tuple[int, int]]:
    """Return (first token, end) of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(is_supervised.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def share_out(n_documents: Sequence[int], limit: int | None) -> list[int]:
    """Return how many documents of each split to compare: in proportion, at least one of each."""
    total = sum(n_documents)
    if limit is None or limit >= total:
        return list(n_documents)
    return [-(-limit * n // total) for n in n_documents]


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
