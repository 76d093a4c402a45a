from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import kl_div

from workflow_scripts import files
from workflow_scripts.evaluate import evaluate_perplexity, gguf_pair
from workflow_scripts.handover.facts import Facts
from workflow_scripts.quantize.calibration import batches
from workflow_scripts.scoring import divergences
from workflow_scripts.scoring.likelihood import all_logits
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.scoring.pieces import Piece, cut
from workflow_scripts.tokens.documents import Documents

NOT_MEASURED = {"n_models_in_memory", "duration_seconds"}


@pytest.fixture
def compare(chain, tmp_path):
    def run(gguf, *more, reference=chain.gguf, tokens=chain.tokens, settings="{}"):
        folder = tmp_path / "evaluation"
        outputs = [folder / name for name in ("Q.json", "Q.tokens.parquet", "Q.divergence.json")]
        flags = zip(("--scores", "--token-scores", "--divergence"), outputs, strict=True)
        evaluate_perplexity.main(
            ["--reference", str(reference), "--gguf", str(gguf), "--facts", str(chain.facts)]
            + ["--tokens", str(tokens), "--settings", settings, "--threads", "1"]
            + [*map(str, more), *(str(part) for pair in flags for part in pair)]
        )
        assert sorted(folder.iterdir()) == sorted(outputs)  # no logits are left
        return files.read_json(outputs[2])

    return run


def plain(chain, gguf):
    """(n, vocabulary) log-probabilities of both files, and the tokens that follow, by conversation;
    all logits are in memory."""
    pieces = list(cut(Documents(chain.tokens), piece_tokens=300))
    found = {}
    for path in (chain.gguf, gguf):
        with LlamaCppModel(path, context_tokens=300, n_threads=1) as model:
            found[path] = [all_logits(model, piece).double().log_softmax(-1) for piece in pieces]
    by_conversation: dict[int, list] = {}
    for piece, p, q in zip(pieces, found[chain.gguf], found[gguf], strict=True):
        targets = torch.from_numpy(piece.input_ids[piece.scored].astype("int64"))
        by_conversation.setdefault(piece.document, []).append((p, q, targets))
    return [
        tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
        for pieces in by_conversation.values()
    ]


def test_every_figure_equals_that_of_all_logits_in_memory(compare, chain, quantize):
    report = compare(quantize(chain.gguf, "Q4_K_M"))
    kl, agrees, change = [], [], []
    for p, q, targets in plain(chain, quantize(chain.gguf, "Q4_K_M")):
        kl.append(kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy())
        agrees.append((p.argmax(-1) == q.argmax(-1)).numpy().astype(float))
        right = [part.gather(1, targets[:, None])[:, 0].exp().numpy() for part in (p, q)]
        change.append(right[1] - right[0])
    expected = {
        "reference": "run-F16.gguf",
        "piece_tokens": 300,
        "n_pieces": 5,
        "n_conversations": 3,
        "n_scored_tokens": sum(map(len, kl)),
    }
    counts = np.array([len(part) for part in kl])
    for name, parts in (
        ("kl_divergence{}_nats", kl),
        ("top1_agreement{}_fraction", agrees),
        ("probability_change{}_fraction", change),
        ("squared{}", [part**2 for part in change]),
    ):
        mean = np.concatenate(parts).mean()
        sums = np.array([part.sum() for part in parts])
        error = np.sqrt(3 / 2 * ((sums - mean * counts) ** 2).sum()) / counts.sum()
        expected |= {name.format(""): mean, name.format("_standard_error"): error}
    rms = np.sqrt(expected.pop("squared"))
    expected["probability_change_rms_fraction"] = rms
    error = expected.pop("squared_standard_error") / (2 * rms)
    expected["probability_change_rms_standard_error_fraction"] = error
    tokens = np.concatenate(kl)
    for name, q in {"median": 50, "p90": 90, "p99": 99, "p99_9": 99.9, "max": 100}.items():
        expected[f"{name}_kl_divergence_nats"] = np.percentile(tokens, q)
    assert report.keys() - NOT_MEASURED == expected.keys()
    for key, value in expected.items():
        found = value if isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-12)
        assert report[key] == found, key
    assert report["n_models_in_memory"] == 2
    # No figure above may be right only because it is 0.
    assert report["kl_divergence_nats"] > 1e-4
    assert 0 < report["top1_agreement_fraction"] < 1
    assert report["probability_change_rms_fraction"] > 0


@pytest.mark.parametrize("n_logits_on_disk", [10**9, 150 * 32_768, 1], ids=["all", "some", "one"])
def test_models_that_take_turns_give_the_same_to_the_bit(
    compare, chain, quantize, monkeypatch, n_logits_on_disk
):
    together = compare(quantize(chain.gguf, "Q4_K_M"))
    monkeypatch.setattr(gguf_pair, "SCRATCH_BYTES", 4 * n_logits_on_disk)
    in_turns = compare(quantize(chain.gguf, "Q4_K_M"), "--memory-gb", 0.001)
    assert (together["n_models_in_memory"], in_turns["n_models_in_memory"]) == (2, 1)
    for key in together.keys() - NOT_MEASURED:
        assert in_turns[key] == together[key], key


def test_memory_for_both_is_two_files_two_caches_and_compute_buffers(chain, quantize):
    pair = gguf_pair.GgufPair(chain.gguf, quantize(chain.gguf, "Q8_0"), 300, 1)
    needed = pair.needed_bytes(Facts.read(chain.facts))
    sizes = sum(path.stat().st_size for path in (chain.gguf, quantize(chain.gguf, "Q8_0")))
    # Two layers of 2 heads of 32 numbers, keys and values in F16, for 300 tokens.
    assert needed == sizes + 2 * (300 * 2 * 2 * 2 * 32 * 2) + gguf_pair.OTHER_BYTES
    assert 0 < gguf_pair.available_bytes() < 2**50


def test_a_file_does_not_diverge_from_itself(compare, chain):
    report = compare(chain.gguf)
    for key, value in report.items():
        if "kl_divergence" in key or "change" in key:
            assert value in (0.0, None), key
    assert report["top1_agreement_fraction"] == 1.0


def test_a_coarser_quantization_diverges_more(compare, chain, quantize):
    fine, coarse = (compare(quantize(chain.gguf, kind)) for kind in ("Q8_0", "Q4_K_M"))
    assert coarse["kl_divergence_nats"] > 5 * fine["kl_divergence_nats"] > 0
    assert coarse["top1_agreement_fraction"] < fine["top1_agreement_fraction"]


# Name in llama-perplexity, unit and tolerance of each figure. llama.cpp keeps the reference's
# probabilities as 16-bit numbers and prints six decimals, or per cent with three decimals. Measured
# differences: 1.2e-6 nats, 5e-7 of it from printing; for the fractions, only from printing.
FIGURES = {
    "kl_divergence_nats": ("Mean    KLD", 1.0, 3e-6),
    "median_kl_divergence_nats": ("Median  KLD", 1.0, 3e-6),
    "p90_kl_divergence_nats": ("90.0%   KLD", 1.0, 3e-6),
    "p99_kl_divergence_nats": ("99.0%   KLD", 1.0, 3e-6),
    "p99_9_kl_divergence_nats": ("99.9%   KLD", 1.0, 3e-6),
    "max_kl_divergence_nats": ("Maximum KLD", 1.0, 3e-6),
    "top1_agreement_fraction": ("Same top p", 0.01, 6e-6),
    "probability_change_fraction": ("Mean    Δp", 0.01, 6e-6),
    "probability_change_rms_fraction": ("RMS Δp    ", 0.01, 6e-6),
}


@pytest.mark.parametrize(
    ("model", "kind"), [("peaked", "Q8_0"), ("peaked", "Q2_K"), ("flat", "Q4_K_M")]
)
def test_figures_equal_those_of_llama_perplexity_on_the_same_text(
    compare, chain, peaked, text, chunk, quantize, llama_tool, tmp_path, model, kind
):
    f16, raw = {"peaked": (peaked.gguf, peaked.text), "flat": (chain.gguf, text)}[model]
    quantized, base = quantize(f16, kind), tmp_path / "base.kld"
    # One chunk at a time, as here: with more at once, its own sums change in the fifth digit.
    options = ["-f", raw, "-c", 256, "-b", 256, "-t", 1, "-ngl", 0, "--kl-divergence-base", base]
    llama_tool("perplexity", "-m", f16, *options)
    done = llama_tool("perplexity", "-m", quantized, *options, "--kl-divergence")
    report = compare(quantized, reference=f16, tokens=chunk(raw))
    for key, (name, unit, tolerance) in FIGURES.items():
        (found,) = re.findall(rf"{re.escape(name)}: +(-?[\d.]+)", done.stdout)
        assert report[key] == pytest.approx(float(found) * unit, abs=tolerance), key
    # No figure may agree only because it is 0: one model has likely tokens, the other ties.
    if model == "peaked":
        assert report["probability_change_rms_fraction"] > 1e-3
    else:
        assert 0.4 < report["top1_agreement_fraction"] < 0.6


def test_models_of_different_vocabularies_are_not_compared(
    ends_with_message,
):
    message = ends_with_message(
        lambda _: divergences.compare(
            [torch.zeros(2, 30)], [torch.zeros(2, 31)], np.zeros(2, np.int32)
        ),
        [],
    )
    for part in ("different vocabularies", "31 tokens", "30"):
        assert part in message


@pytest.mark.parametrize("memory", [[], ["--memory-gb", 0.001]], ids=["both", "in turns"])
def test_the_loss_of_every_token_is_the_same_without_the_reference(
    compare, chain, quantize, tmp_path, memory
):
    compare(quantize(chain.gguf, "Q4_K_M"), *memory)
    alone = [str(tmp_path / name) for name in ("Q.json", "Q.tokens.parquet")]
    evaluate_perplexity.main(
        ["--gguf", str(quantize(chain.gguf, "Q4_K_M")), "--facts", str(chain.facts)]
        + ["--tokens", str(chain.tokens), "--settings", "{}", "--threads", "1"]
        + ["--scores", alone[0], "--token-scores", alone[1]]
    )
    together = tmp_path / "evaluation"
    assert (together / "Q.tokens.parquet").read_bytes() == Path(alone[1]).read_bytes()
    found, expected = (files.read_json(path) for path in (together / "Q.json", Path(alone[0])))
    assert found | {"duration_seconds": 0} == expected | {"duration_seconds": 0}


def test_a_reference_needs_a_gguf(chain, capsys):
    with pytest.raises(SystemExit):
        evaluate_perplexity.main(
            ["--checkpoint", str(chain.merged), "--facts", str(chain.facts), "--tokens"]
            + [str(chain.tokens), "--settings", "{}", "--threads", "1", "--scores", "Q.json"]
            + ["--token-scores", "Q", "--reference", "F16.gguf", "--divergence", "D.json"]
        )
    assert "--reference is for a --gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--reference", "F16.gguf"], ["--divergence", "Q.json"]], ids=lambda flags: flags[0]
)
def test_a_reference_and_its_output_go_together(chain, capsys, flags):
    with pytest.raises(SystemExit):
        evaluate_perplexity.main(
            ["--gguf", str(chain.gguf), "--facts", str(chain.facts), "--tokens", str(chain.tokens)]
            + ["--settings", "{}", "--threads", "1", "--scores", "Q.json", "--token-scores", "Q"]
            + flags
        )
    assert "--reference and --divergence go together" in capsys.readouterr().err


@given(
    lengths=st.lists(st.integers(1, 50), max_size=30),
    n_positions=st.integers(0, 100),
)
def test_a_turn_holds_no_more_positions_than_the_limit_and_every_piece_once(lengths, n_positions):
    pieces = [
        Piece(number, np.zeros(60, np.int32), np.arange(1, 1 + length))
        for number, length in enumerate(lengths)
    ]
    parts = list(batches(pieces, size=lambda piece: len(piece.scored), limit=n_positions))
    assert [piece for part in parts for piece in part] == pieces
    for part in parts:
        assert len(part) == 1 or sum(len(piece.scored) for piece in part) <= n_positions
    for part, after in zip(parts, parts[1:], strict=False):
        assert sum(len(piece.scored) for piece in [*part, after[0]]) > n_positions
