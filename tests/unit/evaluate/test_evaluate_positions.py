from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from workflow_scripts import files
from workflow_scripts.evaluate import evaluate_positions
from workflow_scripts.scoring.likelihood import summarize
from workflow_scripts.scoring.pieces import cut
from workflow_scripts.tokens.documents import Document, Documents

LENGTHS = [700, 40, 513, 300, 2]


@pytest.fixture(scope="module")
def tokens(random_documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    random_documents(folder / "validation.arrow", LENGTHS)
    return folder / "validation.arrow"


@pytest.fixture
def evaluate(checkpoint, facts_path, tokens, tmp_path):
    def run(*more, settings="{}", facts=facts_path):
        evaluate_positions.main(
            [*map(str, more), "--checkpoint", str(checkpoint), "--facts", str(facts)]
            + ["--tokens", str(tokens), "--settings", settings]
            + ["--scores", str(tmp_path / "positions.json")]
        )
        return files.read_json(tmp_path / "positions.json")

    return run


@pytest.fixture
def long_facts(facts, tmp_path):
    facts.changed(context_tokens=1024).write(tmp_path / "facts.json")
    return tmp_path / "facts.json"


def plain_nats(checkpoint, adapter, document):
    """Nats of a whole document's supervised tokens by position, from a plain call with eager
    attention and the window of the model's config."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(model, str(adapter))
    tokens = torch.from_numpy(document.input_ids.astype("int64"))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    nats = cross_entropy(logits, tokens[1:], reduction="none")
    return {
        position: nats[position - 1].item()
        for position in np.flatnonzero(document.is_supervised)
        if position
    }


def test_each_bucket_is_the_mean_of_a_plain_models_nats_at_its_positions(
    evaluate, checkpoint, uniform_adapter, tokens, long_facts
):
    report = evaluate("--adapter", uniform_adapter, facts=long_facts)
    expected: dict[int, list[float]] = {}
    for document in Documents(tokens):
        for position, nats in plain_nats(checkpoint, uniform_adapter, document).items():
            first = next(start for start in (512, 256, 0) if position >= start)
            expected.setdefault(first, []).append(nats)
    buckets = {bucket["first_position"]: bucket for bucket in report["buckets"]}
    assert list(buckets) == sorted(expected) == [0, 256, 512]
    for first, nats in expected.items():
        assert buckets[first]["n_scored_tokens"] == len(nats)
        assert buckets[first]["loss_nats_per_token"] == pytest.approx(np.mean(nats), abs=1e-4)
    assert [buckets[first]["last_position"] for first in (0, 256, 512)] == [255, 511, 1023]
    assert [buckets[first]["n_conversations"] for first in (0, 256, 512)] == [5, 3, 2]
    everything = list(itertools.chain(*expected.values()))
    assert report["n_scored_tokens"] == len(everything)
    assert report["loss_nats_per_token"] == pytest.approx(np.mean(everything), abs=1e-4)
    assert report["n_tokens_beyond_context"] == 0


def test_tokens_beyond_the_context_are_counted_and_not_scored(evaluate):
    report = evaluate()  # a context of 512 tokens
    assert report["n_tokens_beyond_context"] == (700 - 512) + (513 - 512)
    assert [bucket["last_position"] for bucket in report["buckets"]] == [255, 511]


def test_a_limit_scores_only_the_first_conversations(evaluate, long_facts):
    report = evaluate(settings='{"max_conversations": 2}', facts=long_facts)
    assert report["n_conversations"] == 2


def test_the_adapter_and_the_precision_change_the_loss(evaluate, uniform_adapter):
    losses = {
        evaluate(*more)["loss_nats_per_token"]
        for more in ([], ["--adapter", uniform_adapter], ["--precision", "nf4"])
    }
    assert len(losses) == 3


def test_the_buckets_add_up_to_the_whole(evaluate, uniform_adapter, long_facts):
    report = evaluate("--adapter", uniform_adapter, facts=long_facts)
    n = sum(bucket["n_scored_tokens"] for bucket in report["buckets"])
    total = sum(b["n_scored_tokens"] * b["loss_nats_per_token"] for b in report["buckets"])
    assert n == report["n_scored_tokens"]
    assert total / n == pytest.approx(report["loss_nats_per_token"], rel=1e-9)
    assert summarize({0: np.ones(1)}).content().keys() <= set(report["buckets"][0])


def test_the_first_token_is_never_scored():
    """No token comes before it to predict it from."""
    tokens = np.array([5, 6, 7], dtype=np.int32)
    (piece,) = cut([Document("a", tokens, np.ones(3, dtype=bool))], piece_tokens=None)
    assert piece.scored.tolist() == [1, 2]


@pytest.mark.parametrize("lengths", [[], [1]], ids=["no document", "nothing to predict"])
def test_a_split_without_a_token_to_score_is_a_stage_error(
    random_documents, checkpoint, facts_path, tmp_path, ends_with_message, lengths
):
    random_documents(tmp_path / "validation.arrow", lengths)
    message = ends_with_message(
        evaluate_positions.main,
        ["--checkpoint", checkpoint, "--facts", facts_path, "--tokens"]
        + [tmp_path / "validation.arrow", "--settings", "{}", "--scores", tmp_path / "scores.json"],
    )
    for part in ("nothing to score", "validation.arrow", "validation_fraction"):
        assert part in message
    assert not (tmp_path / "scores.json").exists()


def test_a_gguf_is_refused_because_llama_cpp_ignores_the_window(evaluate, tmp_path):
    with pytest.raises(SystemExit) as caught:
        evaluate("--gguf", tmp_path / "model.gguf")
    assert caught.value.code == 2


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.evaluate_positions")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "numpy"}


def test_unknown_settings_are_refused(run_stage, tmp_path):
    done = run_stage(
        *("workflow_scripts.evaluate.evaluate_positions", "--checkpoint", tmp_path),
        *("--facts", tmp_path, "--tokens", tmp_path, "--scores", tmp_path / "s.json"),
        *("--settings", json.dumps({"max_conversation": 3})),
    )
    assert done.returncode == 1
    assert "max_conversation: unknown key" in done.stderr


def test_links_that_apply_the_window_need_no_llama_cpp(run_python):
    done = run_python(
        "import sys; sys.modules['llama_cpp'] = None  # as in the environment that trains\n"
        "from workflow_scripts.evaluate import links, long_prompts\n"
        "from workflow_scripts.scoring import likelihood, token_scores, transformers_model"
    )
    assert done.returncode == 0, done.stderr
