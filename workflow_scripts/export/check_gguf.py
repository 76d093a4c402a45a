"""Gate: the F16 GGUF reads text as the model was trained on, and computes what the merged model
computes.

Tokens: the chat template inside the file, its tokenizer inside llama.cpp, against the ids of
training. Logits: KL divergence to the merged model in float32 on validation text, no piece longer
than the window.

python -m workflow_scripts.export.check_gguf --gguf run-F16.gguf --merged merged/ --facts facts.json
    --clean clean/validation.parquet --tokens tokens/validation.arrow --settings '{}' --threads 2
    --check gguf_check.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.data.documents import Document, Documents
from workflow_scripts.export.check_merged import roomy_device
from workflow_scripts.log import StageError
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.settings import GateSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("check_gguf")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF of convert_gguf")
    parser.add_argument("--merged", type=Path, required=True, help="folder of merge_adapter")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--clean", type=Path, required=True, help="validation conversations")
    parser.add_argument("--tokens", type=Path, required=True, help="validation documents")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates`")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of llama.cpp")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(GateSettings, arguments.settings)

    import torch

    from workflow_scripts.scoring.likelihood import all_logits, divergence
    from workflow_scripts.scoring.transformers_model import TransformersModel

    facts = files.read_json(arguments.facts)
    piece_tokens = cutting.comparable_tokens(facts, None)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    pieces = list(cutting.cut(documents, piece_tokens=piece_tokens))
    chats = files.read_parquet(arguments.clean).to_pylist()
    messages_by_id = {chat["id"]: chat["messages"] for chat in chats}
    merged = TransformersModel(
        arguments.merged,
        window=facts["sliding_window"],
        precision="float32",
        device=roomy_device(facts),
    )
    reference = [all_logits(merged, piece) for piece in pieces]
    del merged
    with LlamaCppModel(
        arguments.gguf, context_tokens=piece_tokens, n_threads=arguments.threads
    ) as model:
        n_parity = check_tokens(model, arguments.gguf, documents, messages_by_id)
        compared = [
            divergence(expected, all_logits(model, piece))
            for expected, piece in zip(reference, pieces, strict=True)
        ]
    divergences = torch.cat([kl for kl, _ in compared])
    agreements = torch.cat([agrees for _, agrees in compared])
    report = {
        "n_conversations_token_parity": n_parity,
        "n_scored_tokens": len(divergences),
        "kl_divergence_nats": float(divergences.mean()),
        "max_kl_divergence_nats": float(divergences.max()),
        "top1_agreement_fraction": float(agreements.double().mean()),
    }
    logger.info("measured %s", log.fields(report))
    if not report["kl_divergence_nats"] <= settings.gguf_kl_divergence_nats:
        raise StageError(
            "the GGUF computes something else than the merged model",
            where=f"{arguments.gguf}, mean over {len(divergences)} tokens",
            found=f"KL divergence {report['kl_divergence_nats']:.3g} nats a token",
            expected=f"at most {settings.gguf_kl_divergence_nats:.3g}"
            " (evaluation.gates.gguf_kl_divergence_nats)",
            to_fix="convert again with the pinned llama-cpp-python; if it stays, please report it",
        )
    files.write_json(arguments.check, report)


def check_tokens(
    model: LlamaCppModel,
    gguf: Path,
    documents: Sequence[Document],
    messages_by_id: dict[str, list[dict[str, str]]],
) -> int:
    """Compare the file's own rendering of each conversation with the ids of training.

    Conversations whose text spells a control token are left out: no text template can keep them
    apart.

    Returns:
        How many were compared.
    Raises:
        StageError: the first difference.
    """
    template = model.metadata("tokenizer.chat_template")
    bos, eos = model.control_text("bos"), model.control_text("eos")
    n_compared = 0
    for document in documents:
        messages = messages_by_id[document.id]
        text = render_template(template, messages, bos=bos, eos=eos)
        if any(model.tokenize(m["content"], adds_bos=False, parses_control=True)
               != model.tokenize(m["content"], adds_bos=False, parses_control=False)
               for m in messages):  # fmt: skip
            continue
        found = model.tokenize(text, adds_bos=False, parses_control=True)
        expected = document.input_ids.tolist()
        if found != expected:
            at = next(
                (
                    at
                    for at, pair in enumerate(zip(found, expected, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(found), len(expected)),
            )
            raise StageError(
                "the GGUF reads a conversation as other tokens than training did",
                where=f"{gguf}, conversation {document.id}, token {at}",
                found=found[at : at + 8],
                expected=expected[at : at + 8],
                to_fix="the merged folder must hold the base's tokenizer.model and chat template",
            )
        n_compared += 1
    return n_compared


def render_template(template: str, messages: list[dict[str, str]], *, bos: str, eos: str) -> str:
    """A chat template applied as llama-cpp-python and transformers apply it (sandboxed Jinja)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise StageError("the chat template refuses a conversation", found=message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda _: ""
    return environment.from_string(template).render(
        messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=False
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
