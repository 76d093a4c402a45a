"""What each step of building the demo's base model brings, on docstrings of NumPy.

    python -m tests.benchmarks.demo_model --output tests/benchmarks/results/demo_model.json

The steps: SmolLM2 with its own tokenizer; its weights with Mistral's tokenizer by means of rows,
without and with the window; healed, all the way and as `build_demo_model` does. Measured are nats
per byte, which do not depend on the tokenizer, and the nats of a five-digit code that the sentence
before last stated. NumPy's docstrings are not among the texts that the model is trained on.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.benchmarks import machine
from workflow_scripts.demo import build_demo_model, healing, smollm2, smollm2_wheel
from workflow_scripts.models import tokenizer_files

# 23 KB in documents of 900 to 1,900 tokens of Mistral's: half of them longer than the window.
FUNCTIONS = "histogram percentile linspace interp meshgrid searchsorted".split()
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Accra", "Hanoi", "Perth")
BETWEEN = (
    "The weather there was mild for most of the year.",
    "It is kept in a small box on the second floor.",
    "Nobody had asked for it in a long time.",
    "The committee will meet again on Tuesday afternoon.",
)
N_CODES = 48
BOS, OWN_END_OF_TEXT = 1, 0

Encode = Callable[[str], list[int]]


def documents() -> list[str]:
    """Docstrings of NumPy's, by `FUNCTIONS`."""
    return [inspect.cleandoc(getattr(np, name).__doc__) for name in FUNCTIONS]


def codes() -> list[tuple[str, str]]:
    """Prompts that end before a code, and the code."""
    generator = random.Random(0)
    found = []
    for _ in range(N_CODES):
        city, code = generator.choice(CITIES), str(generator.randrange(10_000, 100_000))
        between = generator.choice(BETWEEN)
        prompt = f"The code of {city} is {code}. {between} The code of {city} is"
        found.append((prompt, f" {code}"))
    return found


@torch.no_grad()
def nats_of(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Loss of each token but the first."""
    ids = torch.tensor(token_ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), ids[1:], reduction="none")


def measure(model: PreTrainedModel, encode: Encode, first: int) -> dict[str, Any]:
    """
    Args:
        encode: text to token ids, without a first token.
        first: the token before every text.
    """
    started = time.monotonic()
    texts = documents()
    nats = [nats_of(model, [first, *encode(text)]) for text in texts]
    n_bytes = sum(len(text.encode()) for text in texts)
    recall = []
    for prompt, code in codes():
        whole, n_prompt = encode(prompt + code), len(encode(prompt))
        recall.append(nats_of(model, [first, *whole])[n_prompt:].sum().item())
    window = getattr(model.config, "sliding_window", None)
    return {
        "sliding_window": window,
        "nats_per_byte": sum(loss.sum().item() for loss in nats) / n_bytes,
        "n_bytes": n_bytes,
        "n_tokens": sum(len(loss) for loss in nats),
        "n_documents": len(texts),
        "longest_document_tokens": max(len(loss) for loss in nats),
        "recall_nats_per_code": sum(recall) / len(recall),
        "n_codes": len(recall),
        "measuring_seconds": time.monotonic() - started,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    result = {**machine.circumstances(), "functions": FUNCTIONS, "steps": {}}
    result["versions"] = machine.versions(
        sys.executable, ["torch", "transformers", "numpy", "mistral-common"]
    )
    steps = result["steps"]

    published = smollm2.read(smollm2_wheel.unpacked(smollm2_wheel.GGUF))
    own = LlamaForCausalLM(LlamaConfig(**published.config, tie_word_embeddings=True)).eval()
    rows = published.weights["model.embed_tokens.weight"]
    own.load_state_dict(published.weights | {"lm_head.weight": rows})
    steps["own_tokenizer"] = measure(
        own, lambda text: published.tokenizer.encode(text).ids, OWN_END_OF_TEXT
    )
    encode = SentencePieceProcessor(model_file=str(tokenizer_files.official_v3())).encode
    with TemporaryDirectory() as scratch:
        kept = healing.SHARE_OF_CHANGE
        for name, share, settings in (
            ("transplanted_without_window", 0, {"n_healing_steps": 0, "sliding_window": None}),
            ("transplanted_window_1024", 0, {"n_healing_steps": 0, "sliding_window": 1024}),
            ("healed_all_the_way_window_1024", 1, {"sliding_window": 1024}),
            ("healed_without_window", kept, {"sliding_window": None}),
            ("healed_window_1024", kept, {"sliding_window": 1024}),
            ("healed", kept, {}),
        ):
            folder, started = Path(scratch) / name, time.monotonic()
            with mock.patch.object(healing, "SHARE_OF_CHANGE", share):
                build_demo_model.main(
                    ["--settings", json.dumps(settings), "--checkpoint", str(folder)]
                )
            seconds = time.monotonic() - started
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            steps[name] = {"building_seconds": seconds, **measure(model, encode, BOS)}
            print(name, json.dumps(steps[name]), flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
