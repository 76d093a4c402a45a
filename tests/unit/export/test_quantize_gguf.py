from __future__ import annotations

import numpy as np
import pytest
import torch

from workflow_scripts.scoring.likelihood import divergence
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

MODULE = "workflow_scripts.export.quantize_gguf"
TOKENS = np.random.default_rng(0).integers(3, 32_768, size=60).astype(np.int32)


def arguments(gguf, kind, quantized):
    return ["--gguf", gguf, "--type", kind, "--threads", 1, "--quantized", quantized]


@pytest.fixture(scope="module")
def quantized(chain, run_stage, tmp_path_factory):
    """Type → file."""
    folder = tmp_path_factory.mktemp("quantized")
    paths = {kind: folder / f"run-{kind}.gguf" for kind in ("Q8_0", "Q4_K_M")}
    for kind, path in paths.items():
        done = run_stage(MODULE, *arguments(chain.gguf, kind, path))
        assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == sorted(paths.values())
    return paths


def logits(path):
    with LlamaCppModel(path, context_tokens=64, n_threads=1) as model:
        return torch.cat([b.clone() for b in model.logit_blocks(TOKENS, np.arange(60))])


def test_each_type_is_smaller_and_less_like_the_source_than_the_one_before(chain, quantized):
    paths = [chain.gguf, quantized["Q8_0"], quantized["Q4_K_M"]]
    sizes = [path.stat().st_size for path in paths]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.75 * sizes[1]
    reference = logits(chain.gguf)
    errors = [divergence(reference, logits(path))[0].mean().item() for path in paths]
    # Random weights quantize badly; measured 0.0004 and 0.04 nats.
    assert errors[0] == 0 < errors[1] < 0.01 < errors[2] < 1


@pytest.mark.parametrize(("kind", "file_type"), [("Q8_0", "7"), ("Q4_K_M", "15")])
def test_the_files_metadata_are_the_sources_but_for_the_type(chain, quantized, kind, file_type):
    with LlamaCppModel(quantized[kind], context_tokens=16, n_threads=1) as model:
        assert model.metadata("general.file_type") == file_type
        assert model.metadata("llama.context_length") == "300"
        assert (
            model.metadata("tokenizer.chat_template")
            == (chain.merged / "chat_template.jinja").read_text()
        )


def test_a_type_that_does_not_exist_is_refused(chain, run_stage, tmp_path):
    done = run_stage(MODULE, *arguments(chain.gguf, "Q4_K_XL", tmp_path / "m.gguf"))
    assert done.returncode == 1
    for part in ("no such quantization type", "gguf.quantizations", "Q4_K_XL", "config/README.md"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_no_gguf_is_a_stage_error_and_leaves_no_file(run_stage, tmp_path):
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    done = run_stage(MODULE, *arguments(source, "Q8_0", tmp_path / "m.gguf"))
    assert done.returncode == 1
    assert "quantizer failed" in done.stderr and str(source) in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_help_starts_without_torch_or_llama_cpp(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
