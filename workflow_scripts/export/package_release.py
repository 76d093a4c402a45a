"""Package a run for people: GGUFs, Ollama Modelfile, model card, checksums, provenance.

python -m workflow_scripts.export.package_release --name mistral --settings '{…}' --ggufs *.gguf
    --facts facts.json --tokenizer tokenizer/ --checkpoint checkpoint/ --manifest
    training_manifest.json --checks merged_check.json gguf_check.json --scores base.json …
    --release release/
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.export import modelfile
from workflow_scripts.models.checkpoint import served_context
from workflow_scripts.settings import RunSettings, settings_from_json

OUTPUT_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "mistral-common", "llama-cpp-python")
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
    parser.add_argument("--release", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    run = settings_from_json(RunSettings, arguments.settings)
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
        for path in sorted(arguments.tokenizer.iterdir()):
            if path.name in ("chat_template.jinja", "tokenizer_config.json"):
                files.copy_or_link(path, folder / path.name)
        manifest = files.read_json(arguments.manifest)
        card = model_card(arguments.name, run, source, facts, manifest, scores, arguments.ggufs)
        files.write_text(folder / "README.md", card)
        provenance = {
            "run": arguments.name,
            **run.model_dump(),
            "base": source,
            "base_files": facts["files"],
            "training": manifest,
            "gates": {path.stem: files.read_json(path) for path in arguments.checks},
            "packages": dict(entry.split("=") for entry in log.versions(*PACKAGES).split()),
            "python": platform.python_version(),
        }
        files.write_json(folder / "provenance.json", provenance)
        released = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
        sums = [f"{files.sha256(path)}  {path.name}" for path in released]
        files.write_text(folder / "SHA256SUMS", "\n".join(sums) + "\n")
    logger.info("packaged n_files=%d path=%s", len(sums) + 1, arguments.release)


def model_card(
    name: str,
    run: RunSettings,
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
    header = {
        "base_model": source["source"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    ollama = f"ollama create {name} -f Modelfile && ollama run {name}"
    python = (
        "from llama_cpp import Llama\n\n"
        f'model = Llama("{ggufs[-1].name}", n_ctx={context})\n'
        'messages = [{"role": "user", "content": "Hello"}]\n'
        'print(model.create_chat_completion(messages)["choices"][0]["message"]["content"])'
    )
    return f"""---
{front}
---
# {name}

{source["source"]}, fine-tuned{" as a whole" if method == "full" else " with LoRA"} on
`{run.dataset}` (packing `{run.packing}`, recipe `{run.recipe}`), merged, and converted to GGUF by
Tramontane.

## Measured

Perplexity on {measured["n_conversations"]} test conversations ({measured["n_scored_tokens"]}
supervised tokens) in pieces of at most {measured["piece_tokens"]} tokens; lower is better. Every
line scores the same tokens.

| link | perplexity | against the base |
| --- | ---: | ---: |
{chr(10).join(rows)}

{why_context}

## Run it

```sh
{ollama}
```

```python
{python}
```

`provenance.json` holds the base's file hashes, the training settings, the gates' figures and the
versions; `sha256sum -c SHA256SUMS` checks the files.
"""


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
