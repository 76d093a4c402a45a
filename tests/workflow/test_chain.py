"""What a tiny build of every stage leaves: gates passed, links that agree, a release that runs."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from workflow_scripts import files
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.scoring.token_scores import TokenScores

RUNS = ["generic", "mistral"]


def scores(folder: Path, run: str, link: str) -> dict:
    return files.read_json(folder / "results" / "runs" / run / "evaluation" / f"{link}.json")


@pytest.mark.parametrize("run", RUNS)
def test_every_link_scores_the_same_tokens(tiny: Path, run: str) -> None:
    base = files.read_json(tiny / "results/evaluation/demo/stdlib-help/base.json")
    for link in ("adapter", "merged", "F16", "Q8_0", "Q4_K_M"):
        measured = scores(tiny, run, link)
        assert measured["n_scored_tokens"] == base["n_scored_tokens"]
        assert measured["n_conversations"] == base["n_conversations"] == 8
        assert measured["piece_tokens"] == 512


@pytest.mark.parametrize("run", RUNS)
def test_losses_of_tokens_make_up_a_link_s_score_and_pair_with_those_of_the_next(
    tiny: Path, run: str
) -> None:
    folder = tiny / "results" / "runs" / run / "evaluation"
    links = ["adapter", "merged", "F16", "Q8_0", "Q4_K_M"]
    tokens = [TokenScores.read(folder / f"{link}.tokens.parquet") for link in links]
    for link, one in zip(links, tokens, strict=True):
        assert one.metrics().perplexity == scores(tiny, run, link)["perplexity"]
        assert set(one.sources) == {"demo"}
    for before, one in itertools.pairwise(tokens):
        assert one.scores_the_same(before)
    # Rounding to 8 bits costs less than rounding to 4, and its error is known better.
    q8_0, q4_k_m = (one.difference(tokens[2]) for one in tokens[3:])
    assert abs(q8_0.mean) < 0.01 and q8_0.standard_error < q4_k_m.standard_error
    divergences = [
        files.read_json(folder / f"{link}.divergence.json")["kl_divergence_nats"]
        for link in links[3:]
    ]
    assert 0 < divergences[0] < 0.1 * divergences[1]


@pytest.mark.parametrize("run", RUNS)
def test_a_text_is_scored_alike_by_every_link(tiny: Path, run: str) -> None:
    folder = tiny / "results" / "runs" / run / "evaluation" / "texts" / "options"
    base = tiny / "results" / "evaluation" / "demo" / "texts" / "options" / "base.json"
    links = [files.read_json(folder / f"{link}.json") for link in ("merged", "F16", "Q8_0")]
    for found in (*links, files.read_json(base)):
        assert found["n_scored_tokens"] == 255 * found["n_conversations"] > 1000
        assert found["n_pieces"] == found["n_conversations"]
    merged, f16, q8_0 = (found["perplexity"] for found in links)
    assert f16 == pytest.approx(merged, rel=0.001)
    assert q8_0 == pytest.approx(f16, rel=0.01)


@pytest.mark.parametrize("run", RUNS)
def test_f16_scores_as_the_merged_model_and_q8_0_as_f16(tiny: Path, run: str) -> None:
    merged, f16, q8_0 = (
        scores(tiny, run, link)["perplexity"] for link in ("merged", "F16", "Q8_0")
    )
    assert f16 == pytest.approx(merged, rel=0.001)
    assert q8_0 == pytest.approx(f16, rel=0.01)


@pytest.mark.parametrize("run", RUNS)
def test_training_lowers_the_perplexity_of_the_base(tiny: Path, run: str) -> None:
    base = files.read_json(tiny / "results/evaluation/demo/stdlib-help/base.json")
    assert scores(tiny, run, "adapter")["perplexity"] < base["perplexity"]


@pytest.mark.parametrize("run", RUNS)
def test_merged_models_of_one_shape_decode_at_one_speed(tiny: Path, run: str) -> None:
    folder = tiny / "results" / "runs" / run / "evaluation"
    speed = files.read_json(folder / "merged.inference.json")
    assert speed["engine"] == "transformers"
    assert speed["decode_milliseconds_per_token"] > 0
    assert speed["peak_memory_bytes"] > speed["size_bytes"] > 0


def test_the_merged_model_loads_with_plain_from_pretrained(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = tiny / "results/runs/mistral/merged"
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert len(tokenizer) == model.config.vocab_size == 32768
    assert model.config.sliding_window == 512
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in merged.iterdir()
    }


def test_a_chat_begins_with_exactly_one_bos(tiny: Path) -> None:
    from llama_cpp import Llama
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does `json.dumps` do?"},
    ]
    official = load_mistral_tokenizer(tiny / "results/models/demo/tokenizer", for_training=False)
    request = ChatCompletionRequest.from_openai(messages=messages)
    expected = official.encode_chat_completion(request).tokens
    gguf = tiny / "results/runs/mistral/release/mistral-Q4_K_M.gguf"
    model = Llama(str(gguf), n_ctx=512, verbose=False)
    try:
        model.create_chat_completion(messages, max_tokens=1, temperature=0)
        read = model.input_ids[: len(expected)].tolist()
    finally:
        model.close()
    assert read == expected
    assert read.count(1) == 1


@pytest.mark.parametrize("run", RUNS)
def test_the_release_checks_its_own_sums(tiny: Path, run: str) -> None:
    release = tiny / "results/runs" / run / "release"
    checked = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=release, capture_output=True, text=True, check=True
    )
    assert checked.stdout.count(": OK") == 9
    gguf = f"{run}-F16.gguf"
    assert (release / gguf).samefile(tiny / "results/runs" / run / "gguf" / gguf)
    assert "PARAMETER num_ctx 512" in (release / "Modelfile").read_text()


def test_snakemakes_own_report_holds_the_tables_and_figures(tiny: Path) -> None:
    from tests.workflow.conftest import DEMO, TINY, snakemake_in

    result = snakemake_in(tiny)("--configfile", DEMO, TINY, "--report", "report.html")
    assert result.returncode == 0, result.stderr[-2000:]
    page = (tiny / "report.html").read_text(encoding="utf-8")
    for name in ("comparison.html", "chain.html", "chain.svg", "loss.svg"):
        assert name in page


def test_no_checkpoint_is_left_when_training_has_finished(tiny: Path) -> None:
    assert not list((tiny / "checkpoints").rglob("adapter_model.safetensors"))
