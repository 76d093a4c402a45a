"""Package a run for people: GGUFs, Ollama Modelfile, model card, checksums, provenance.

python -m workflow_scripts.export.package_release --name mistral --settings '{…}' --ggufs *.gguf
    --facts facts.json --tokenizer tokenizer/ --checkpoint checkpoint/ --manifest
    training_manifest.json --checks merged_check.json gguf_check.json --scores base.json …
    --dataset clean/*.parquet --config '{…}' --release release/
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.export import modelfile, provenance
from workflow_scripts.models.checkpoint import served_context
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.settings import HUB_ID, RunSettings, settings_from_json

OUTPUT_VERSION = 2
logger = log.stage_logger("package_release")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--name", required=True, help="name of the run")
    parser.add_argument("--settings", required=True, help="JSON of `runs.<name>`")
    parser.add_argument("--ggufs", type=Path, nargs="+", required=True, help="F16 first")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--manifest", type=Path, required=True, help="training manifest")
    parser.add_argument("--checks", type=Path, nargs="+", required=True, help="the gates' JSON")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="of every link")
    parser.add_argument("--dataset", type=Path, nargs="+", required=True, help="cleaned splits")
    parser.add_argument("--config", required=True, help="JSON: the entries that the run combines")
    parser.add_argument("--benchmarks", type=Path, help="folder of Snakemake's benchmarks")
    parser.add_argument("--quantized-by", help="for the model card: user or organization")
    parser.add_argument("--release", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    run = settings_from_json(RunSettings, arguments.settings)
    config = json.loads(arguments.config)
    facts = files.read_json(arguments.facts)
    scores = {path.stem: files.read_json(path) for path in arguments.scores}
    source_file = arguments.checkpoint / "source.json"
    source = files.read_json(source_file) if source_file.is_file() else {"source": run.model}

    with files.atomic_folder(arguments.release) as folder:
        for gguf in arguments.ggufs:
            files.copy_or_link(gguf, folder / gguf.name)
        default = arguments.ggufs[-1].name
        files.write_text(
            folder / "Modelfile",
            modelfile.modelfile(
                default,
                tokenizer_version=facts["tokenizer_version"],
                context_tokens=served_context(facts),
            ),
        )
        # Mistral's own tokenizer file: what the release is served with, and can be checked by.
        shipped = ("chat_template.jinja", "tokenizer_config.json")
        shipped += (find_tokenizer(arguments.tokenizer, facts["tokenizer_version"]).name,)
        for name in shipped:
            files.copy_or_link(arguments.tokenizer / name, folder / name)
        manifest = files.read_json(arguments.manifest)
        front = front_matter(source, config, quantized_by=arguments.quantized_by)
        card = model_card(
            arguments.name, run, front, source, facts, manifest, scores, arguments.ggufs
        )
        files.write_text(folder / "README.md", card)
        origin = {
            "run": arguments.name,
            **run.model_dump(),
            "context_tokens": served_context(facts),
            "config": provenance.without_folders(config),
            "base": provenance.without_folders(source),
            "base_files": facts["files"],
            "dataset_files": provenance.hashes(arguments.dataset),
            "training": manifest,
            "gates": {path.stem: files.read_json(path) for path in arguments.checks},
            "scores": scores,
            "packages": provenance.versions(),
            "python": platform.python_version(),
            "git_revision": provenance.git_revision(),
            "hardware": provenance.hardware(),
            "duration_seconds": (
                provenance.durations(arguments.benchmarks) if arguments.benchmarks else {}
            ),
        }
        files.write_json(folder / "provenance.json", origin)
        released = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
        sums = [f"{files.sha256(path)}  {path.name}" for path in released]
        files.write_text(folder / "SHA256SUMS", "\n".join(sums) + "\n")
    logger.info("packaged n_files=%d path=%s", len(sums) + 1, arguments.release)


def front_matter(
    source: dict[str, Any], config: dict[str, Any], *, quantized_by: str | None
) -> dict[str, Any]:
    """What the Hub reads of a card; what is not known is left out.

    Source: https://huggingface.co/docs/hub/model-cards; `quantized_by`: GGUF repositories.
    """
    model, dataset = config.get("model", {}), config.get("dataset", {})
    sources = dataset.get("sources") or {"all": dataset}
    hub_datasets = sorted({one["hub"] for one in sources.values() if one.get("hub")})
    is_published = HUB_ID.fullmatch(source["source"]) is not None
    known = {
        "base_model": source["source"] if is_published else None,
        "base_model_relation": "finetune" if is_published else None,
        "license": model.get("license"),
        "datasets": hub_datasets,
        "language": (dataset.get("cleaning") or {}).get("languages"),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "mistral", "tramontane"],
        "quantized_by": quantized_by,
    }
    return {key: value for key, value in known.items() if value}


def model_card(
    name: str,
    run: RunSettings,
    front: dict[str, Any],
    source: dict[str, Any],
    facts: dict[str, Any],
    manifest: dict[str, Any],
    scores: dict[str, dict[str, Any]],
    ggufs: Sequence[Path],
) -> str:
    """The release's README: what it is, how good each file measured, how to run it."""
    context = served_context(facts)
    base = scores["base"]["perplexity"]
    rows = [
        f"| {link} | {measured['perplexity']:.3f} | {measured['perplexity'] / base - 1:+.1%} |"
        for link, measured in scores.items()
    ]
    measured = scores["merged"]
    window = facts["sliding_window"]
    why_context = (
        f"The model attends within a sliding window of {window} tokens, which llama.cpp does not"
        f" apply to this architecture; so the GGUFs advertise {context} tokens. With transformers"
        f" the context is {facts['context_tokens']}."
        if window and window < facts["context_tokens"]
        else f"Context: {context} tokens."
    )
    scaling = facts.get("rope_scaling")
    if scaling:
        why_context += (
            f" Positions are stretched by {scaling['factor']:g} ({scaling['type']} RoPE scaling)"
            f" over the base's {scaling['original_context_tokens']} tokens, in training and in"
            " these files."
        )
    method = manifest.get("identity", {}).get("recipe", {}).get("method")
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    base_name = provenance.without_folders(source["source"])
    quantized = "\n".join(f"| `{path.name}` | {path.stat().st_size / 1e9:.3g} |" for path in ggufs)
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

{base_name}, fine-tuned{" as a whole" if method == "full" else " with LoRA"} on
`{run.dataset}` (packing `{run.packing}`, recipe `{run.recipe}`), merged, and converted to GGUF by
Tramontane.

## Measured

Perplexity on {measured["n_conversations"]} test conversations ({measured["n_scored_tokens"]}
supervised tokens) in pieces of at most {measured["piece_tokens"]} tokens; lower is better. Every
line scores the same tokens.

| link | perplexity | against the base |
| --- | ---: | ---: |
{chr(10).join(rows)}

| file | size, GB |
| --- | ---: |
{quantized}

## Limits

{why_context}

Measured is perplexity on chats like those of training, and nothing else: not the truth of answers,
not safety. What the base model cannot do, or does wrong, this one may inherit.

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


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
