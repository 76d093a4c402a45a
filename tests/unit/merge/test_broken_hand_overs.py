"""A hand-over that breaks gives a clear message, and leaves no file that looks whole.

The tests of `check_merged` and `check_gguf` cover a damaged tokenizer, a swapped template and a
resized vocabulary.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from workflow_scripts.merge import check_merged, merge_adapter

MEGABYTE = 10**6


def run_with_room(module, arguments, n_bytes):
    """Run a stage in a process that may not write a larger file than this: the kernel refuses the
    rest, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def merging(chain, merged):
    return (
        ["--checkpoint", chain.checkpoint, "--facts", chain.facts, "--tokenizer", chain.tokenizer]
        + ["--adapter", chain.adapter, "--merged", merged]
    )  # fmt: skip


def test_a_disk_that_fills_while_merging_leaves_no_folder(chain, tmp_path):
    size = (chain.merged / "model.safetensors").stat().st_size
    merged = tmp_path / "out" / "merged"
    done = run_with_room(
        "workflow_scripts.merge.merge_adapter", merging(chain, merged), size - MEGABYTE
    )
    assert done.returncode == 1, done.stderr
    assert "merge_adapter: the disk is full" in done.stderr
    assert "File too large" in done.stderr and "to fix:   free some space" in done.stderr
    assert "workflow_scripts.doctor" in done.stderr
    assert "Traceback" not in done.stderr
    assert everything_in(tmp_path / "out") == []


def test_a_disk_that_fills_while_merging_again_keeps_the_old_folder(chain, tmp_path):
    merged = tmp_path / "merged"
    merge_adapter.main([str(part) for part in merging(chain, merged)])
    before = {path.name: path.stat().st_mtime_ns for path in merged.iterdir()}
    done = run_with_room(
        "workflow_scripts.merge.merge_adapter", merging(chain, merged), 10 * MEGABYTE
    )
    assert done.returncode == 1
    assert {path.name: path.stat().st_mtime_ns for path in merged.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_disk_that_fills_while_converting_leaves_no_gguf(chain, tmp_path):
    gguf = tmp_path / "out" / "run-F16.gguf"
    arguments = ["--merged", chain.merged, "--facts", chain.facts, "--name", "run", "--gguf", gguf]
    done = run_with_room("workflow_scripts.quantize.convert_gguf", arguments, 5 * MEGABYTE)
    assert done.returncode == 1, done.stderr
    assert "llama.cpp's converter failed" in done.stderr
    assert "see its message above; the file takes about 0.0 GB, and" in done.stderr
    assert "GB are free" in done.stderr
    assert everything_in(tmp_path / "out") == []


def test_a_disk_that_fills_while_quantizing_leaves_no_gguf(chain, tmp_path):
    quantized = tmp_path / "out" / "run-Q8_0.gguf"
    arguments = ["--gguf", chain.gguf, "--settings", '{"type": "Q8_0"}', "--threads", 1]
    arguments += ["--quantized", quantized]
    done = run_with_room("workflow_scripts.quantize.quantize_gguf", arguments, 5 * MEGABYTE)
    assert done.returncode == 1, done.stderr
    assert "llama.cpp's quantizer failed" in done.stderr
    assert everything_in(tmp_path / "out") == []


@pytest.mark.parametrize("kept", [0.5, 0.999, 0])
def test_a_base_whose_shard_is_cut_short_is_not_merged(chain, tmp_path, ends_with_message, kept):
    base = shutil.copytree(chain.checkpoint, tmp_path / "base")
    shard = base / "model.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: int(kept * len(raw))])
    merged = tmp_path / "out" / "merged"
    message = ends_with_message(
        merge_adapter.main, merging(chain._replace(checkpoint=base), merged)
    )
    assert ("a weights file is damaged or truncated" if kept else "a file is empty") in message
    assert f"where:    {shard}" in message
    assert not (tmp_path / "out").exists()


def test_a_merged_model_whose_shard_is_cut_short_stops_the_chain(
    chain, tmp_path, ends_with_message
):
    merged = shutil.copytree(chain.merged, tmp_path / "merged")
    shard = merged / "model.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-4])
    check = tmp_path / "merged_check.json"
    message = ends_with_message(
        check_merged.main,
        ["--checkpoint", chain.checkpoint, "--facts", chain.facts, "--adapter", chain.adapter]
        + ["--precision", "nf4", "--tokenizer", chain.tokenizer, "--merged", merged]
        + ["--tokens", chain.tokens, "--settings", "{}", "--check", check],
    )
    assert "a weights file is damaged or truncated" in message and str(shard) in message
    assert not check.exists()
    assert shard.stat().st_size == len(raw) - 4
