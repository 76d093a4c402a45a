from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from workflow_scripts import files
from workflow_scripts.evaluate import evaluate_perplexity
from workflow_scripts.tokens.documents import Documents


def score(chain, scores, *model, settings="{}"):
    evaluate_perplexity.main(
        [*map(str, model), "--facts", str(chain.facts), "--tokens", str(chain.tokens)]
        + ["--clean", str(chain.clean), "--settings", settings, "--threads", "1"]
        + ["--scores", str(scores), "--token-scores", str(scores.with_suffix(".tokens.parquet"))]
    )
    return files.read_json(scores)


def nats_by_document(model, documents):
    """Nats of the supervised tokens of every document, each scored whole by a plain call."""
    found = []
    with torch.no_grad():
        for document in documents:
            tokens = torch.from_numpy(document.input_ids.astype("int64"))
            logits = model(tokens[None]).logits[0, :-1]
            nats = cross_entropy(logits, tokens[1:], reduction="none")
            found.append(nats[torch.from_numpy(document.is_supervised)[1:]].double())
    return found


@pytest.fixture(scope="module")
def merged_model(chain):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        chain.merged, dtype=torch.float32, attn_implementation="eager"
    )


def test_perplexity_equals_a_plain_models_over_supervised_tokens(chain, merged_model, tmp_path):
    short = '{"max_conversations": 2}'
    report = score(chain, tmp_path / "merged.json", "--checkpoint", chain.merged, settings=short)
    nats = torch.cat(nats_by_document(merged_model, list(Documents(chain.tokens))[:2]))
    assert report["n_conversations"] == 2
    assert report["n_scored_tokens"] == len(nats)
    assert report["loss_nats_per_token"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert report["perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-5)
    assert report["precision"] == "float32" or torch.cuda.is_available()


@pytest.fixture(scope="module", params=["--checkpoint", "--gguf"])
def scored(request, chain, tmp_path_factory):
    """JSON of a link's scores, and the table of its tokens read by pandas."""
    path = {"--checkpoint": chain.merged, "--gguf": chain.gguf}[request.param]
    scores = tmp_path_factory.mktemp("scored") / "link.json"
    report = score(chain, scores, request.param, path)
    table = files.read_parquet(scores.with_suffix(".tokens.parquet")).to_pandas()
    return request.param, report, table.astype({"conversation": str, "source": str})


def test_the_table_holds_every_supervised_token_with_its_loss(chain, merged_model, scored):
    link, report, table = scored
    documents = list(Documents(chain.tokens))
    expected = nats_by_document(merged_model, documents)
    for document, nats in zip(documents, expected, strict=True):
        rows = table[table.conversation == document.id]
        positions = np.flatnonzero(document.is_supervised[1:]) + 1
        assert rows.position.tolist() == positions.tolist()
        assert rows.token.tolist() == document.input_ids[positions].tolist()
        if len(document.input_ids) > report["piece_tokens"]:
            continue
        # float32 and llama.cpp's F16: measured 0.009 of 10 nats; two float32 runs: 5e-6.
        tolerance = 2e-5 if link == "--checkpoint" else 0.03
        np.testing.assert_allclose(rows.nats, nats.numpy(), atol=tolerance)
    assert len(table) == report["n_scored_tokens"]
    # The second chat has two answers.
    assert sorted(table[table.conversation == "chat/1"].turn.unique()) == [1, 2]
    assert set(table.source) == {"ours", "web"}


def recomputed(table, column="nats"):
    """Mean, error and perplexity of a table's tokens, by the formula."""
    by_conversation = table.groupby("conversation")[column].agg(["sum", "size"])
    n, tokens = len(by_conversation), by_conversation["size"].sum()
    loss = table[column].astype("float64").mean()
    sums = table[column].astype("float64").groupby(table.conversation).sum()
    squares = ((sums - loss * by_conversation["size"]) ** 2).sum()
    error = math.sqrt(n / (n - 1) * squares) / tokens if n > 1 else None
    return {
        "n_conversations": n,
        "n_scored_tokens": tokens,
        "loss_nats_per_token": loss,
        "loss_standard_error_nats_per_token": error,
        "perplexity": math.exp(loss),
    }


def test_every_aggregate_follows_from_the_table(scored):
    link, report, table = scored
    derived = [(report, table, "", "nats")]
    if link == "--checkpoint":
        derived.append((report, table, "full_length_", "whole_nats"))
    else:
        assert "whole_nats" not in table.columns
    for part in report["by_position"]:
        inside = table.position.between(part["first_position"], part["last_position"])
        derived.append((part, table[inside], "", "nats"))
    for key in ("turn", "source"):
        values = [part[key] for part in report[f"by_{key}"]]
        assert sorted(values) == sorted(table[key].unique())
        derived += [
            (part, table[table[key] == part[key]], "", "nats") for part in report[f"by_{key}"]
        ]
    assert len(derived) >= 1 + 2 + 2 + 2
    for found, rows, prefix, column in derived:
        for key, value in recomputed(rows, column).items():
            expected = value if value is None else pytest.approx(value, rel=1e-9)
            assert found[prefix + key] == expected, (prefix, key)
    # The remaining fields say what was scored, not how well.
    rest = {key.removeprefix("full_length_") for key in report} - recomputed(table).keys()
    assert rest - {"by_position", "by_turn", "by_source"} <= {
        "piece_tokens",
        "n_pieces",
        "size_bytes",
        "precision",
        "n_conversations_beyond_piece",
        "duration_seconds",
    }


def test_whole_conversations_are_scored_in_addition_to_their_pieces(chain, merged_model, tmp_path):
    report = score(chain, tmp_path / "merged.json", "--checkpoint", chain.merged)
    documents = Documents(chain.tokens)
    nats = torch.cat(nats_by_document(merged_model, documents))
    assert report["piece_tokens"] == 300
    # The third conversation: one whole piece, then pieces with half a piece of new tokens each.
    n_of_the_long_one = 1 + math.ceil((len(documents[2].input_ids) - 300) / 150)
    assert report["n_pieces"] == 2 + n_of_the_long_one > 3
    assert report["n_conversations_beyond_piece"] == 1
    assert report["n_scored_tokens"] == report["full_length_n_scored_tokens"] == len(nats)
    assert report["full_length_loss_nats_per_token"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert report["loss_nats_per_token"] != report["full_length_loss_nats_per_token"]


def test_without_full_length_only_pieces_are_scored(chain, tmp_path):
    given = ["--checkpoint", chain.merged]
    whole = score(chain, tmp_path / "whole.json", *given)
    report = score(chain, tmp_path / "pieces.json", *given, settings='{"full_length": false}')
    left_out = {key for key in whole if key.startswith("full_length_")}
    assert left_out and report.keys() == whole.keys() - left_out - {"n_conversations_beyond_piece"}
    assert report["loss_nats_per_token"] == whole["loss_nats_per_token"]
    table = files.read_parquet(tmp_path / "pieces.tokens.parquet")
    assert "whole_nats" not in table.column_names


def test_the_live_adapter_and_the_merged_model_score_alike(chain, tmp_path):
    merged = score(chain, tmp_path / "merged.json", "--checkpoint", chain.merged)
    live = score(
        chain, tmp_path / "live.json", "--checkpoint", chain.checkpoint, "--adapter", chain.adapter
    )
    base = score(chain, tmp_path / "base.json", "--checkpoint", chain.checkpoint)
    # The difference is one rounding of each weight to bfloat16: measured 1e-4.
    assert live["loss_nats_per_token"] == pytest.approx(merged["loss_nats_per_token"], abs=5e-3)
    assert abs(base["loss_nats_per_token"] - live["loss_nats_per_token"]) > 0.05


def test_a_gguf_scores_the_same_tokens_as_its_source(chain, tmp_path):
    merged = score(chain, tmp_path / "merged.json", "--checkpoint", chain.merged)
    gguf = score(chain, tmp_path / "F16.json", "--gguf", chain.gguf)
    for key in ("piece_tokens", "n_pieces", "n_conversations", "n_scored_tokens"):
        assert gguf[key] == merged[key], key
    # Measured: 4e-4 of 11 nats.
    assert gguf["loss_nats_per_token"] == pytest.approx(merged["loss_nats_per_token"], abs=5e-3)
    assert "full_length_perplexity" not in gguf  # llama.cpp ignores the window


def test_the_nf4_base_is_scored_in_nf4(chain, tmp_path):
    nf4 = ("--checkpoint", chain.checkpoint, "--precision", "nf4")
    report = score(chain, tmp_path / "nf4.json", *nf4)
    base = score(chain, tmp_path / "base.json", "--checkpoint", chain.checkpoint)
    assert report["precision"] == "nf4"
    assert report["n_scored_tokens"] == base["n_scored_tokens"]
    assert report["loss_nats_per_token"] != base["loss_nats_per_token"]


def test_the_int8_base_is_scored_in_int8(chain, tmp_path):
    link = ("--checkpoint", chain.checkpoint, "--adapter", chain.adapter, "--precision")
    int8 = score(chain, tmp_path / "int8.json", *link, "int8")
    nf4 = score(chain, tmp_path / "nf4.json", *link, "nf4")
    native = score(chain, tmp_path / "native.json", *link, "native")
    assert int8["precision"] == "int8"
    assert len({report["loss_nats_per_token"] for report in (int8, nf4, native)}) == 3


def test_a_link_is_scored_at_the_positions_of_its_facts(chain, tmp_path):
    from tests.facts import facts_of
    from workflow_scripts.settings import RopeScalingSettings

    scaling = RopeScalingSettings(type="yarn", factor=4)
    facts_of(chain.checkpoint, scaling).write(tmp_path / "facts.json")
    stretched = chain._replace(facts=tmp_path / "facts.json")
    link = ("--checkpoint", chain.checkpoint)
    plain = score(chain, tmp_path / "plain.json", *link)
    found = score(stretched, tmp_path / "stretched.json", *link)
    assert found["n_scored_tokens"] == plain["n_scored_tokens"]
    assert abs(found["loss_nats_per_token"] - plain["loss_nats_per_token"]) > 1e-3


@pytest.mark.parametrize("tokens", [[], [[1, 5, 6]]], ids=["no conversation", "none supervised"])
def test_a_split_without_a_supervised_token_is_a_stage_error(
    chain, write_documents, tmp_path, ends_with_message, tokens
):
    write_documents(tmp_path / "test.arrow", tokens, [[] for _ in tokens])
    message = ends_with_message(
        evaluate_perplexity.main,
        ["--checkpoint", chain.merged, "--facts", chain.facts, "--tokens"]
        + [tmp_path / "test.arrow", "--settings", "{}", "--threads", 1]
        + ["--scores", tmp_path / "scores.json", "--token-scores", tmp_path / "scores.parquet"],
    )
    for part in ("nothing to score", "test.arrow", f"{len(tokens)} documents", "test_fraction"):
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["test.arrow"]


@pytest.mark.parametrize("model", [[], ["--checkpoint", "a", "--gguf", "b"]], ids=["none", "both"])
def test_exactly_one_model_is_scored(chain, tmp_path, model):
    with pytest.raises(SystemExit) as caught:
        score(chain, tmp_path / "scores.json", *model)
    assert caught.value.code == 2


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.evaluate_perplexity")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
