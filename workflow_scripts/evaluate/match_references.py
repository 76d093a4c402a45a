"""Exact match of greedy answers with the reference answers that chats of the test split mark.

Asked is the last question of each such chat, as token ids of training and with all that was said
before. An answer matches where it is one of the references once both are without case, punctuation,
articles and superfluous white space: exact match of SQuAD (arXiv:1606.05250, its evaluate-v1.1.py).
So `f(x)` matches `f[x]`. A dataset that marks no reference has no score.

python -m workflow_scripts.evaluate.match_references --gguf run-Q4_K_M.gguf --facts facts.json
    --tokenizer tokenizer/ --tokens tokens/test.arrow --clean clean/test.parquet --settings '{}'
    --threads 8 --scores Q4_K_M.references.json --samples Q4_K_M.references.parquet
"""

from __future__ import annotations

import argparse
import math
import re
import string
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow_scripts import files, log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.evaluate.long_prompts import wilson_interval
from workflow_scripts.evaluate.task_scores import Sample, write_samples
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.tasks import ReferenceScores, TaskScore
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import TaskSettings, settings_from_json
from workflow_scripts.tokens.documents import Document, Documents

if TYPE_CHECKING:
    import numpy as np

    from workflow_scripts.evaluate.greedy import Greedy

OUTPUT_VERSION = 1
TASK = "reference answers"
METRIC = "exact_match"
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
logger = log.stage_logger("match_references")


class Asked(NamedTuple):
    """A prompt, and the right answers."""

    conversation: str
    prompt: np.ndarray
    """(n,) int32."""
    references: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of the test split")
    parser.add_argument("--clean", type=Path, required=True, help="their conversations")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.tasks`")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument("--samples", type=Path, required=True, help="to write: every answer")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(TaskSettings, arguments.settings)
    facts = Facts.read(arguments.facts)
    longest = facts.served_context_tokens - settings.max_answer_tokens
    references = references_of(arguments.clean)
    every = list(prompts_of(Documents(arguments.tokens), references))
    asked = [one for one in every if len(one.prompt) <= longest][: settings.limit]
    started = time.perf_counter()
    rows = answered(arguments, facts, asked, settings.max_answer_tokens) if asked else []
    report = ReferenceScores(
        n_with_reference=len(references),
        n_too_long=sum(len(one.prompt) > longest for one in every),
        scores=(score(rows),) if rows else (),
        duration_seconds=time.perf_counter() - started,
    )
    write_samples(arguments.samples, rows)
    report.write(arguments.scores)
    shown = log.fields(report.content())
    logger.info("wrote path=%s n_asked=%d %s", arguments.scores, len(asked), shown)


def references_of(clean: Path) -> dict[str, list[str]]:
    """The right answers of each conversation of a split that marks some, by id."""
    table = files.read_parquet(clean, columns=["id", "references"])
    marked = zip(table["id"].to_pylist(), table["references"].to_pylist(), strict=True)
    return {name: references for name, references in marked if references}


def prompts_of(
    documents: Iterable[Document], references: Mapping[str, list[str]]
) -> Iterator[Asked]:
    """What stands before the last supervised answer of each conversation with a reference."""
    import numpy as np

    for document in documents:
        supervised = np.flatnonzero(document.is_supervised)
        # The last answer is the one that the reference is of; one of weight 0 is not looked for.
        if document.id not in references or not document.is_supervised[-1]:
            continue
        begins = supervised[np.flatnonzero(np.diff(supervised, prepend=-2) > 1)[-1]]
        if begins:
            yield Asked(document.id, document.input_ids[:begins], references[document.id])


def answered(
    arguments: argparse.Namespace,
    facts: ModelShape,
    asked: Sequence[Asked],
    max_tokens: int,
) -> list[Sample]:
    """What each prompt scored."""
    from workflow_scripts.evaluate.greedy import by_llama_cpp, by_transformers

    tokenizer = load_mistral_tokenizer(arguments.tokenizer, for_training=False)
    eos = tokenizer.instruct_tokenizer.tokenizer.eos_id

    def rows(greedy: Greedy) -> list[Sample]:
        found: list[Sample] = []
        for one in log.progress(asked, logger, total=len(asked), unit="prompts"):
            tokens = greedy(one.prompt, max_tokens)
            answer = tokenizer.decode([token for token in tokens if token != eos]).strip()
            found.append(
                {
                    "asked": TASK,
                    "task": TASK,
                    "document": one.conversation,
                    "metric": METRIC,
                    "filter": "none",
                    "value": float(matches(answer, one.references)),
                    "prompt_hash": files.fingerprint([one.prompt.tolist(), one.references]),
                    "answer": answer,
                    "reference": "\n".join(one.references),
                    "is_truncated": False,
                }
            )
        return found

    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        context = max(len(one.prompt) for one in asked) + max_tokens
        with LlamaCppModel(
            arguments.gguf, context_tokens=context, n_threads=arguments.threads
        ) as model:
            return rows(by_llama_cpp(model, eos))
    return rows(by_transformers(link_arguments.load_transformers(arguments, facts).model, eos))


def matches(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones."""
    return normalized(answer) in map(normalized, references)


def normalized(text: str) -> str:
    """Without case, punctuation, articles and superfluous white space, in SQuAD's order."""
    text = text.lower().translate(WITHOUT_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def score(rows: Sequence[Sample]) -> TaskScore:
    """The share of matches, with Wilson's interval."""
    n = len(rows)
    n_right = sum(row["value"] == 1 for row in rows)
    low, high = wilson_interval(n_right, n)
    share = n_right / n
    return TaskScore(
        asked=TASK,
        task=TASK,
        n_examples=0,
        metric=METRIC,
        filter="none",
        score=share,
        standard_error=math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None,
        low=low,
        high=high,
        n_documents=n,
        n_truncated=0,
        subtasks=(TASK,),
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
