"""Gate: the F16 GGUF tokenizes text as training did, and computes the same as the merged model.

Contents: every weight, bit for bit, and the metadata are compared with the merged folder
(`gguf_contents.py`). Tokens: the file's chat template and its tokenizer inside llama.cpp are
compared with the ids of training (`gguf_tokens.py`). Logits: KL divergence from the merged model in
float32 on validation text, in pieces no longer than the window.

python -m workflow_scripts.quantize.check_gguf --gguf run-F16.gguf --merged merged/
    --facts facts.json --clean clean/validation.parquet --tokens tokens/validation.arrow
    --settings '{}' --threads 2 --check gguf_check.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GgufCheck
from workflow_scripts.log import StageError
from workflow_scripts.settings import GgufGateSettings, settings_from_json

OUTPUT_VERSION = 3
logger = log.stage_logger("check_gguf")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF of convert_gguf")
    parser.add_argument("--merged", type=Path, required=True, help="folder of merge_adapter")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--clean", type=Path, required=True, help="validation conversations")
    parser.add_argument("--tokens", type=Path, required=True, help="validation documents")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates.gguf`")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of llama.cpp")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(GgufGateSettings, arguments.settings)

    import torch

    from workflow_scripts.merge.base_weights import BaseWeights
    from workflow_scripts.merge.model_weights import Weights
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.quantize import gguf_contents, gguf_tokens
    from workflow_scripts.scoring import pieces as cutting
    from workflow_scripts.scoring.likelihood import all_logits, divergence
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.streamed_model import StreamedModel, batches
    from workflow_scripts.tokens import token_parity
    from workflow_scripts.tokens.documents import Documents

    facts = Facts.read(arguments.facts)
    piece_tokens = cutting.comparable_tokens(facts, None)
    documents = Documents(arguments.tokens)
    scored = list(itertools.islice(documents, settings.n_conversations))
    pieces = list(cutting.cut(scored, piece_tokens=piece_tokens))
    chats = token_parity.sample(arguments.clean, documents, settings.parity_conversations)
    official = load_mistral_tokenizer(arguments.merged, for_training=True)
    contents = gguf_contents.check(arguments.gguf, arguments.merged, facts)
    merged = StreamedModel(
        arguments.merged, Weights(BaseWeights(arguments.merged)), window=facts.sliding_window
    )
    with LlamaCppModel(
        arguments.gguf, context_tokens=piece_tokens, n_threads=arguments.threads
    ) as model:
        gguf_tokens.check_ends(model, arguments.gguf, official)
        parity = gguf_tokens.check_tokens(model, arguments.gguf, chats, official)
        compared = [
            divergence(expected, all_logits(model, piece))
            for batch in batches(pieces)
            for expected, piece in zip(merged.logits(batch), batch, strict=True)
        ]
    if parity.n_misread:
        logger.warning(
            "misread_by_llama_cpp n_conversations=%d (combining marks)", parity.n_misread
        )
    divergences = torch.cat([kl for kl, _ in compared])
    agreements = torch.cat([agrees for _, agrees in compared])
    report = GgufCheck(
        n_tensors=contents.n_tensors,
        n_metadata_keys=contents.n_metadata_keys,
        n_vocabulary_entries=contents.n_vocabulary_entries,
        n_conversations_token_parity=parity.n_compared,
        n_conversations_left_out=parity.n_left_out,
        n_conversations_llama_cpp_misreads=parity.n_misread,
        n_scored_tokens=len(divergences),
        kl_divergence_nats=float(divergences.mean()),
        max_kl_divergence_nats=float(divergences.max()),
        top1_agreement_fraction=float(agreements.double().mean()),
    )
    logger.info("measured %s", log.fields(report.model_dump()))
    if not report.kl_divergence_nats <= settings.kl_divergence_nats:
        raise StageError(
            "the GGUF computes something else than the merged model",
            where=f"{arguments.gguf}, mean over {len(divergences)} tokens",
            found=f"KL divergence {report.kl_divergence_nats:.3g} nats per token",
            expected=f"at most {settings.kl_divergence_nats:.3g}"
            " (evaluation.gates.gguf.kl_divergence_nats)",
            to_fix="convert again with the pinned llama-cpp-python; if that fails, report it",
        )
    report.write(arguments.check)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
