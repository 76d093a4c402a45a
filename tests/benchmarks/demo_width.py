"""Does widening the demo's model pay, so that llama.cpp's k-quants apply to it?

    python -m tests.benchmarks.demo_width --results results --run mistral \
        --output tests/benchmarks/results/demo_width.json

A k-quant packs blocks of 256 values of a row. 576 is no multiple of 256, so llama.cpp gives other
types than asked. Zeros that make the width 768 keep the model's function and allow k-quants, with
43 % more parameters. The merged model of a finished demo build is quantized as it is and widened;
compared are size, perplexity of the test conversations, divergence from F16, and how much of the
adapter's change of the weights is left. The time of a training step is measured for both widths, in
turns.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from tests.benchmarks import machine
from workflow_scripts.evaluate import evaluate_perplexity
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.scores import Divergence, Scores
from workflow_scripts.quantize import compute_imatrix, convert_gguf, llama_cpp_source, quantize_gguf

WIDTH, N_HEADS, N_KV_HEADS = 768, 12, 4  # from 576, 9 and 3: as many queries a key as before
QUANTIZATIONS = {
    "as_it_is": ("Q8_0", "Q5_0", "Q4_0", "Q4_1"),
    "widened": ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M"),
}
STEP_TOKENS = 1024
N_STEPS = 5
THREADS = "2"


def widened(model: MistralForCausalLM) -> MistralForCausalLM:
    """The same function in width `WIDTH`: zeros in every new row and column.

    A root mean square over 768 values of which 576 are not zero is smaller by √(576/768), so the
    weights of the norms are multiplied by that, and eps by its square.
    """
    narrow = model.config
    share = narrow.hidden_size / WIDTH
    config = MistralConfig(
        **narrow.to_dict()
        | {
            "hidden_size": WIDTH,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": N_KV_HEADS,
            "head_dim": narrow.head_dim,
            "rms_norm_eps": narrow.rms_norm_eps * share,
        }
    )
    wide = MistralForCausalLM(config).eval()
    weights = {}
    source = model.state_dict()
    for name, target in wide.state_dict().items():
        weight = source[name]
        padded = torch.zeros_like(target)
        if weight.dim() == 1:
            padded[: len(weight)] = weight * math.sqrt(share)
        else:
            padded[: weight.shape[0], : weight.shape[1]] = weight
        weights[name] = padded
    wide.load_state_dict(weights)
    wide.tie_weights()
    return wide


@torch.no_grad()
def largest_logit_difference(one: MistralForCausalLM, other: MistralForCausalLM) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32_000, (1, 300), generator=generator)
    first, second = (model(input_ids=ids, use_cache=False).logits for model in (one, other))
    return (first - second).abs().max().item()


def step_seconds(models: dict[str, MistralForCausalLM]) -> dict[str, float]:
    """Median time of forward and backward of `STEP_TOKENS` tokens, the models in turns."""
    ids = torch.randint(3, 32_000, (1, STEP_TOKENS), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(N_STEPS + 1):
        for name, model in models.items():
            started = time.monotonic()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            seconds[name].append(time.monotonic() - started)
            model.zero_grad(set_to_none=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def kept_change(base: Path, f16: Path, quantized: Path) -> float:
    """How much of what training changed a quantization keeps: 1 is all, 0 is the base's weights.

    The change of the feed-forward weights (F16 minus base), and what is left of it (quantized minus
    base) projected onto it.
    """
    sys.path.insert(0, str(llama_cpp_source.converter("gguf-py")))
    from gguf import GGUFReader
    from gguf.quants import dequantize

    weights = load_file(base / "model.safetensors")
    files_of = [{one.name: one for one in GGUFReader(path).tensors} for path in (f16, quantized)]
    kept = changed = 0.0
    for name in files_of[0]:
        place = re.fullmatch(r"blk\.(\d+)\.ffn_(up|gate|down)\.weight", name)
        if place is None:
            continue
        before = weights[f"model.layers.{place[1]}.mlp.{place[2]}_proj.weight"].double().numpy()
        rows, columns = before.shape  # a widened tensor has zeros beyond
        change, left = (
            dequantize(tensors[name].data, tensors[name].tensor_type)[:rows, :columns] - before
            for tensors in files_of
        )
        kept += float((change * left).sum())
        changed += float((change * change).sum())
    return kept / changed


def measure_quantizations(
    base: Path, merged: Path, facts: Path, tokens: Path, clean: Path, types: Sequence[str]
) -> dict[str, Any]:
    """What each type makes of a merged model."""
    folder = merged.parent
    f16, imatrix = folder / "F16.gguf", folder / "imatrix.gguf"
    of_facts = ["--facts", str(facts)]
    convert_gguf.main(["--merged", str(merged), *of_facts, "--name", "demo", "--gguf", str(f16)])
    compute_imatrix.main(
        [
            *("--gguf", str(f16), *of_facts, "--tokens", str(tokens / "train.arrow")),
            *("--settings", '{"n_tokens": 4096}', "--threads", THREADS),
            *("--imatrix", str(imatrix)),
        ]
    )
    found = {}
    for name in types:
        gguf = folder / f"{name}.gguf"
        quantize_gguf.main(
            [
                *("--gguf", str(f16), "--settings", json.dumps({"type": name})),
                *("--imatrix", str(imatrix), "--threads", THREADS, "--quantized", str(gguf)),
            ]
        )
        scores, divergence = folder / "scores.json", folder / "divergence.json"
        evaluate_perplexity.main(
            [
                *("--gguf", str(gguf), "--reference", str(f16), *of_facts),
                *("--tokens", str(tokens / "test.arrow"), "--clean", str(clean)),
                *("--settings", "{}", "--threads", THREADS, "--scores", str(scores)),
                *("--token-scores", str(folder / "token_scores.parquet")),
                *("--divergence", str(divergence)),
            ]
        )
        found[name] = {
            "size_bytes": gguf.stat().st_size,
            "perplexity": Scores.read(scores).perplexity,
            "divergence": Divergence.read(divergence).content(),
            "kept_change": kept_change(base, f16, gguf),
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="of a finished demo")
    parser.add_argument("--run", default="mistral", help="whose merged model is taken")
    parser.add_argument("--output", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    results = arguments.results
    merged = results / "runs" / arguments.run / "merged"
    facts = Facts.read(results / "models" / "demo" / "facts.json")
    data = results / "data" / "stdlib-help"
    narrow = MistralForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    wide = widened(narrow)
    result = {
        **machine.circumstances(),
        "versions": machine.versions(sys.executable, ["torch", "transformers", "llama-cpp-python"]),
        "largest_logit_difference": largest_logit_difference(narrow, wide),
        "step_tokens": STEP_TOKENS,
        "step_seconds": step_seconds({"as_it_is": narrow, "widened": wide}),
        "models": {},
    }
    for name, model in (("as_it_is", narrow), ("widened", wide)):
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "merged"
            shutil.copytree(merged, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            model.to(torch.bfloat16).save_pretrained(folder)
            own_facts = Path(scratch) / "facts.json"
            facts.changed(
                hidden_size=model.config.hidden_size,
                n_heads=model.config.num_attention_heads,
                n_kv_heads=model.config.num_key_value_heads,
            ).write(own_facts)
            result["models"][name] = {
                "n_parameters": model.num_parameters(),
                "quantizations": measure_quantizations(
                    results / "models" / "demo" / "checkpoint",
                    folder,
                    own_facts,
                    data / "demo" / "tokens",
                    data / "clean" / "test.parquet",
                    QUANTIZATIONS[name],
                ),
            }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
