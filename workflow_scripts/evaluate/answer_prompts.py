"""Answer the first prompts of the test split with one link, greedily: examples to read.

A prompt is everything before a conversation's first supervised answer, as the token ids of
training; that answer is kept as the reference. The conversations with the lowest ids come first.
Ids are hashes of the content, so the sample does not depend on the order of any file.

python -m workflow_scripts.evaluate.answer_prompts --gguf run-Q4_K_M.gguf --facts facts.json
    --tokenizer tokenizer/ --tokens tokens/test.arrow --settings '{"n_prompts": 5}' --threads 8
    --answers Q4_K_M.answers.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.answers import Answer, Answers
from workflow_scripts.settings import SampleSettings

OUTPUT_VERSION = 2
logger = log.stage_logger("answer_prompts")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of the test split")
    parser.add_argument("--answers", type=Path, required=True, help="to write: JSON")
    arguments, settings, link = link_arguments.parse(
        parser, argv, SampleSettings, "evaluation.samples"
    )

    from workflow_scripts.evaluate import greedy, links, prompts
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.tokens.documents import Documents

    longest = link.facts.served_context_tokens - settings.max_tokens
    found = prompts.before_first_answer(Documents(arguments.tokens), longest)
    asked = list(itertools.islice(found, settings.n_prompts))
    if not asked:
        raise log.StageError(
            "there is no prompt to answer",
            where=arguments.tokens,
            found="no conversation with an answer after a short enough prompt",
            expected=f"a prompt of at most {longest} tokens",
            to_fix="lower evaluation.samples.max_tokens, or raise cleaning.test_fraction",
        )
    tokenizer = load_mistral_tokenizer(arguments.tokenizer, for_training=False)
    eos = tokenizer.instruct_tokenizer.tokenizer.eos_id
    started = time.perf_counter()
    context_tokens = max(len(one.prompt) for one in asked) + settings.max_tokens
    with links.loaded(link, context_tokens) as model:
        answer = greedy.by_link(model, eos)
        given = [answer(one.prompt, settings.max_tokens) for one in asked]

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


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
