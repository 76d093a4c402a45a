"""Exact match of greedy answers with the reference answers that conversations of the test split
mark.

The prompt is the last question of such a conversation with everything before it, as the token ids
of training. An answer matches if it equals one of the references after both lose case, punctuation,
articles and extra white space: SQuAD's exact match (arXiv:1606.05250, its evaluate-v1.1.py).
So `f(x)` matches `f[x]`. A dataset without references has no score.

python -m workflow_scripts.evaluate.match_references --gguf run-Q4_K_M.gguf --facts facts.json
    --tokenizer tokenizer/ --tokens tokens/test.arrow --clean clean/test.parquet --settings '{}'
    --threads 8 --scores Q4_K_M.references.json --samples Q4_K_M.references.parquet
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.tasks import ReferenceScores
from workflow_scripts.settings import TaskSettings

if TYPE_CHECKING:
    from workflow_scripts.evaluate.task_scores import Sample

OUTPUT_VERSION = 1
logger = log.stage_logger("match_references")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of the test split")
    parser.add_argument("--clean", type=Path, required=True, help="conversations of the test split")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument("--samples", type=Path, required=True, help="to write: every answer")
    arguments, settings, link = link_arguments.parse(parser, argv, TaskSettings, "evaluation.tasks")

    from workflow_scripts.evaluate import exact_match, greedy, links, prompts
    from workflow_scripts.evaluate.task_scores import write_samples
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.tokens.documents import Documents

    longest = link.facts.served_context_tokens - settings.max_answer_tokens
    references = references_of(arguments.clean)
    every = list(prompts.before_last_answer(Documents(arguments.tokens), references))
    asked = [one for one in every if len(one.prompt) <= longest][: settings.limit]
    started = time.perf_counter()
    rows: list[Sample] = []
    if asked:
        tokenizer = load_mistral_tokenizer(arguments.tokenizer, for_training=False)
        eos = tokenizer.instruct_tokenizer.tokenizer.eos_id
        context_tokens = max(len(one.prompt) for one in asked) + settings.max_answer_tokens
        with links.loaded(link, context_tokens) as model:
            answer = greedy.by_link(model, eos)
            for one in log.progress(asked, logger, total=len(asked), unit="prompts"):
                tokens = answer(one.prompt, settings.max_answer_tokens)
                text = tokenizer.decode([token for token in tokens if token != eos]).strip()
                rows.append(exact_match.sample(one, text, references[one.conversation]))
    report = ReferenceScores(
        n_with_reference=len(references),
        n_too_long=sum(len(one.prompt) > longest for one in every),
        scores=(exact_match.score(rows),) if rows else (),
        duration_seconds=time.perf_counter() - started,
    )
    write_samples(arguments.samples, rows)
    report.write(arguments.scores)
    shown = log.fields(report.content())
    logger.info("wrote path=%s n_asked=%d %s", arguments.scores, len(asked), shown)


def references_of(clean: Path) -> dict[str, list[str]]:
    """Return the reference answers of a split by conversation id, where there are any."""
    table = files.read_parquet(clean, columns=["id", "references"])
    marked = zip(table["id"].to_pylist(), table["references"].to_pylist(), strict=True)
    return {name: references for name, references in marked if references}


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
