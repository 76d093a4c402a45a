"""Merges by our own program and by PEFT, for the tests of this room."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.facts import facts_of
from workflow_scripts.merge import merge_adapter


def as_arguments(**options):
    """`--key value` for each option, as text."""
    return [
        part
        for key, value in options.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]


def merge(checkpoint, adapter, merged, *, base="original", facts=None, tokenizer=None):
    """Run merge_adapter; without a tokenizer, that of an empty folder.

    Args:
        facts: of the checkpoint, with other positions perhaps.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.json")
        (facts or facts_of(checkpoint)).write(path)
        empty = Path(folder, "tokenizer")
        empty.mkdir()
        merge_adapter.main(
            as_arguments(
                checkpoint=checkpoint,
                facts=path,
                tokenizer=tokenizer or empty,
                adapter=adapter,
                merge_base=base,
                merged=merged,
            )
        )
    return merged


def merged_by_peft(base, adapter, folder, *, dtype="bfloat16", is_safe=False, **options):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    live = PeftModel.from_pretrained(model, adapter, **options)
    live.merge_and_unload(safe_merge=is_safe).save_pretrained(folder)
    return folder


def all_tensors(folder):
    """Name → tensor of every shard in a folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
