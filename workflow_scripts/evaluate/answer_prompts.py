"""Answer the first prompts of the test split by one link, greedily: examples to read.

A prompt is everything before a conversation's first supervised answer, as token ids of training;
that answer is kept as the reference. The first conversations are those with the lowest ids, which
are hashes of the content: a sample that depends on no file's order.

python -m workflow_scripts.evaluate.answer_prompts --gguf run-Q4_K_M.gguf --facts facts.json
    --tokenizer tokenizer/ --tokens tokens/test.arrow --settings '{"n_prompts": 5}' --threads 8
    --answers Q4_K_M.answers.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow_scripts import log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.evaluate.greedy import by_llama_cpp, by_transformers
from workflow_scripts.handover.answers import Answer, Answers
from workflow_scripts.handover.facts import Facts
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import SampleSettings, settings_from_json
from workflow_scripts.tokens.documents import Document, Documents

if TYPE_CHECKING:
    import numpy as np

OUTPUT_VERSION = 2
logger = log.stage_logger("answer_prompts")


class Asked(NamedTuple):
    """A prompt, and the answer that the conversation has."""

    conversation: str
    prompt: np.ndarray
    """(n,) int32."""
    reference: np.ndarray
    """(n,) int32, EOS at its end."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of the test split")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.samples`")
    parser.add_argument("--answers", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(SampleSettings, arguments.settings)
    facts = Facts.read(arguments.facts)
    longest = facts.served_context_tokens - settings.max_tokens
    asked = list(
        itertools.islice(prompts_of(Documents(arguments.tokens), longest), settings.n_prompts)
    )
    if not asked:
        raise log.StageError(
            "there is no prompt to answer",
            where=arguments.tokens,
            found="no conversation with an answer after a short enough prompt",
            expected=f"one of at most {longest} tokens",
            to_fix="lower evaluation.samples.max_tokens, or raise cleaning.test_fraction",
        )
    tokenizer = load_mistral_tokenizer(arguments.tokenizer, for_training=False)
    eos = tokenizer.instruct_tokenizer.tokenizer.eos_id
    started = time.perf_counter()
    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        context = max(len(one.prompt) for one in asked) + settings.max_tokens
        with LlamaCppModel(
            arguments.gguf, context_tokens=context, n_threads=arguments.threads
        ) as model:
            given = [by_llama_cpp(model, eos)(one.prompt, settings.max_tokens) for one in asked]
    else:
        scorer = link_arguments.load_transformers(arguments, facts)
        given = [
            by_transformers(scorer.model, eos)(one.prompt, settings.max_tokens) for one in asked
        ]

    def text(tokens: Iterable[int]) -> str:
        return tokenizer.decode([int(token) for token in tokens if token != eos]).strip()

    answers = tuple(
        Answer(
            conversation=one.conversation,
            prompt=text(one.prompt),
            reference=text(one.reference),
            answer=text(tokens),
            n_tokens=len(tokens),
            is_ended=bool(tokens) and tokens[-1] == eos,
            is_reference=tokens == one.reference.tolist(),
        )
        for one, tokens in zip(asked, given, strict=True)
    )
    report = Answers(answers=answers, duration_seconds=time.perf_counter() - started)
    report.write(arguments.answers)
    logger.info("answered n_prompts=%d path=%s", len(answers), arguments.answers)


def prompts_of(documents: Documents | Sequence[Document], longest: int) -> Iterator[Asked]:
    """The first answer of every conversation, in the order of their ids.

    Args:
        longest: tokens of a prompt; a conversation with a longer one is left out.
    """
    import numpy as np

    ids = documents.ids if isinstance(documents, Documents) else [one.id for one in documents]
    for number in sorted(range(len(documents)), key=ids.__getitem__):
        document = documents[number]
        supervised = np.flatnonzero(document.is_supervised)
        if not len(supervised) or not 0 < supervised[0] <= longest:
            continue
        first = supervised[0]
        others = np.flatnonzero(~document.is_supervised[first:])
        end = first + others[0] if len(others) else len(document.input_ids)
        yield Asked(document.id, document.input_ids[:first], document.input_ids[first:end])


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
