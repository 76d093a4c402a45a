"""The gate of the GGUF, and the choice of the base to merge into, on a finished demo build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.demo.conftest import BASE, RESULTS
from workflow_scripts import files
from workflow_scripts.handover.gates import GgufCheck, MergeBaseChoice
from workflow_scripts.log import StageError
from workflow_scripts.merge import choose_merge_base
from workflow_scripts.models import read_model_facts
from workflow_scripts.quantize import check_gguf, convert_gguf

MODEL = RESULTS / "models" / "demo"
DATA = RESULTS / "data" / "stdlib-help"


def folder_of(weights: Path, folder: Path, *, window: int | None) -> Path:
    """A model with its tokenizer, as `merge_adapter` writes it."""
    shutil.copytree(weights, folder)
    shutil.copytree(MODEL / "tokenizer", folder, dirs_exist_ok=True)
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"sliding_window": window})
    return folder


def facts_of(folder: Path) -> Path:
    facts = folder.parent / "facts.json"
    read_model_facts.main(["--checkpoint", str(folder), "--facts", str(facts)])
    return facts


def gguf_check(gguf: Path, merged: Path, facts: Path) -> GgufCheck:
    check = gguf.with_suffix(".json")
    check_gguf.main(
        [
            *("--gguf", str(gguf), "--merged", str(merged), "--facts", str(facts)),
            *("--clean", str(DATA / "clean" / "validation.parquet")),
            *("--tokens", str(DATA / "demo" / "tokens" / "validation.arrow")),
            *("--settings", "{}", "--threads", "2", "--check", str(check)),
        ]
    )
    return GgufCheck.read(check)


@pytest.mark.parametrize(
    ("dtype", "window"), [("bfloat16", None), ("float16", 512), ("float32", 512)]
)
def test_a_right_gguf_passes(bases, tmp_path, dtype, window):
    merged = folder_of(bases[dtype], tmp_path / "merged", window=window)
    facts = facts_of(merged)
    gguf = tmp_path / "model-F16.gguf"
    convert_gguf.main(
        ["--merged", str(merged), "--facts", str(facts), "--name", "demo", "--gguf", str(gguf)]
    )
    found = gguf_check(gguf, merged, facts)
    print(f"{dtype}, window {window}: {found}")
    assert found.n_tensors == 272 and found.n_conversations_token_parity > 0
    # The same file for a model of another window is another model's.
    other = folder_of(bases[dtype], tmp_path / "other" / "merged", window=256)
    with pytest.raises(StageError, match="metadata differs from the merged model's"):
        gguf_check(gguf, other, facts_of(other))


@pytest.mark.parametrize("run", ["mistral", "generic"])
def test_the_base_to_merge_into_is_the_better_or_the_nearer_one(run, tmp_path):
    choice = tmp_path / "choice.json"
    choose_merge_base.main(
        [
            *("--checkpoint", str(BASE), "--facts", str(MODEL / "facts.json")),
            *("--adapter", str(RESULTS / "runs" / run / "adapter")),
            *("--tokens", str(DATA / "demo" / "tokens" / "validation.arrow")),
            *("--settings", "{}", "--choice", str(choice)),
        ]
    )
    found = MergeBaseChoice.read(choice)
    print(f"{run}: {found}")
    chosen, other = found.original, found.dequantized
    if found.merge_base == "dequantized":
        chosen, other = other, chosen
    difference = found.loss_difference_nats_per_token
    error = found.loss_difference_standard_error_nats_per_token
    if abs(difference) > 2 * error:
        assert chosen.perplexity < other.perplexity
    else:
        assert chosen.kl_divergence_nats < other.kl_divergence_nats
