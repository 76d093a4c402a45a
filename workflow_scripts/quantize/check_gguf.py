"""Gate: the F16 GGUF reads text as the model was trained on, and computes what the merged model
computes.

Contents: every weight, bit for bit, and the metadata, against the merged folder
(`gguf_contents.py`). Tokens: the chat template inside the file, its tokenizer inside llama.cpp,
against the ids of training. Logits: KL divergence to the merged model in float32 on validation
text, no piece longer than the window.

python -m workflow_scripts.quantize.check_gguf --gguf run-F16.gguf --merged merged/
    --facts facts.json --clean clean/validation.parquet --tokens tokens/validation.arrow
    --settings '{}' --threads 2 --check gguf_check.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GgufCheck
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.quantize import gguf_contents
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import GgufGateSettings, settings_from_json
from workflow_scripts.tokens import token_parity
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.tokens.token_parity import Chat

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

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
    from workflow_scripts.scoring.likelihood import all_logits, divergence
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.streamed_model import StreamedModel, batches

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
        check_ends(model, arguments.gguf, official)
        parity = check_tokens(model, arguments.gguf, chats, official)
        compared = [
            divergence(expected, all_logits(model, piece))
            for batch in batches(pieces)
            for expected, piece in zip(merged.logits(batch), batch, strict=True)
        ]
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
            found=f"KL divergence {report.kl_divergence_nats:.3g} nats a token",
            expected=f"at most {settings.kl_divergence_nats:.3g}"
            " (evaluation.gates.gguf.kl_divergence_nats)",
            to_fix="convert again with the pinned llama-cpp-python; if it stays, please report it",
        )
    report.write(arguments.check)


def check_ends(model: LlamaCppModel, gguf: Path, official: MistralTokenizer) -> None:
    """Plain text is read with BOS in front and no EOS behind, as its users' programs ask for it.

    Raises:
        StageError: it is not.
    """
    tokenizer = official.instruct_tokenizer.tokenizer
    tokens = model.tokenize("text", adds_bos=True, parses_control=False)
    if tokens[0] != tokenizer.bos_id or tokens[1] == tokenizer.bos_id:
        problem = "BOS once, in front"
    elif tokens[-1] == tokenizer.eos_id:
        problem = "no EOS at the end"
    else:
        return
    raise StageError(
        "the GGUF reads plain text with other control tokens than Mistral's tokenizer",
        where=f"{gguf}, tokenizer.ggml.add_bos_token, .add_eos_token",
        found=tokens,
        expected=problem,
        to_fix=gguf_contents.TO_FIX,
    )


class Parity(NamedTuple):
    """How many conversations llama.cpp reads as training did, and how many were not judged."""

    n_compared: int
    n_left_out: int
    """The template renders them in its own way, or they spell a control token."""
    n_misread: int
    """With combining marks, where llama.cpp's split of tekken is known to differ."""


def check_tokens(
    model: LlamaCppModel, gguf: Path, chats: Iterable[Chat], official: MistralTokenizer
) -> Parity:
    """Compare the file's own rendering of each conversation with the ids of training.

    Args:
        official: the tokenizer that the model ships with.
    Raises:
        StageError: the first difference.
    """
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    decode = partial(official.decode, special_token_policy=SpecialTokenPolicy.KEEP)
    is_tekken = model.metadata("tokenizer.ggml.model") == "gpt2"
    n_compared = n_left_out = n_misread = 0
    for chat in chats:
        texts = list(token_parity.texts_of(chat.messages, chat.tools))
        if token_parity.why_template_differs(chat.messages, chat.tools, official=official) or any(
            spells_control_token(model, text) for text in texts
        ):
            n_left_out += 1
            continue
        found = render(model, chat)
        expected = chat.document.input_ids.tolist()
        # llama.cpp's split of tekken takes a combining mark for punctuation.
        if found != expected and is_tekken and any(map(has_mark, texts)):
            n_misread += 1
            continue
        token_parity.compare(
            found,
            expected,
            what="the GGUF reads a conversation as other tokens than training did",
            where=f"{gguf}, conversation {chat.document.id}",
            decode=decode,
            to_fix="the merged folder must hold the base's tokenizer files and chat template",
        )
        n_compared += 1
    if n_misread:
        logger.warning("misread_by_llama_cpp n_conversations=%d (combining marks)", n_misread)
    return Parity(n_compared, n_left_out, n_misread)


def spells_control_token(model: LlamaCppModel, text: str) -> bool:
    as_control = model.tokenize(text, adds_bos=False, parses_control=True)
    return as_control != model.tokenize(text, adds_bos=False, parses_control=False)


def has_mark(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


def render(model: LlamaCppModel, chat: Chat) -> list[int]:
    """A conversation's ids by the template and the tokenizer inside the file."""
    bos, eos = model.control_text("bos"), model.control_text("eos")
    if token_parity.is_text(chat.messages):
        # A GGUF that comes from SentencePiece adds no space of its own: its template writes it.
        space = " " if model.metadata("tokenizer.ggml.model") == "llama" else ""
        text = f"{bos}{space}{chat.messages[0]['content']}{eos}"
    else:
        messages, tools = token_parity.template_arguments(chat.messages, chat.tools)
        template = model.metadata("tokenizer.chat_template")
        text = render_template(template, messages, tools, bos=bos, eos=eos)
    return model.tokenize(text, adds_bos=False, parses_control=True)


def render_template(
    template: str,
    messages: list[dict[str, Any]],  # untyped: as chat templates take them
    tools: list[dict[str, Any]] | None,  # untyped: the same
    *,
    bos: str,
    eos: str,
) -> str:
    """A chat template applied as transformers applies it: sandboxed Jinja, JSON as it is."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise StageError("the chat template refuses a conversation", found=message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda _: ""
    # Jinja's own sorts keys and escapes for HTML.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(
        messages=messages,
        tools=tools,
        bos_token=bos,
        eos_token=eos,
        add_generation_prompt=False,
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
