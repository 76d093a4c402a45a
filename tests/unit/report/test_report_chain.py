from __future__ import annotations

import dataclasses
import statistics
from xml.etree import ElementTree

import pytest

from tests.scores import DIVERGENCE, scores_of
from tests.speed import SPEED
from tests.unit.report.conftest import CHANGES, FACTS, token_scores, write_link
from workflow_scripts import files
from workflow_scripts.report import chain_table, report_chain


@pytest.fixture
def write(results, tmp_path):
    def run(results=results):
        paths = {key: tmp_path / f"chain.{key}" for key in ("tsv", "md", "html", "svg")}
        report_chain.main(
            [*results.arguments, "--tsv", str(paths["tsv"])]
            + ["--markdown", str(paths["md"]), "--html", str(paths["html"])]
            + ["--figure", str(paths["svg"])]
        )
        return paths

    return run


def test_each_link_is_compared_with_its_source(write, read_tsv):
    header, *rows = read_tsv(write()["tsv"])
    assert header[:6] == [
        "Link",
        "Perplexity",
        "vs. its source, %",
        "KL divergence to F16, nats",
        "Same top token as F16, %",
        "Whole conversations",
    ]
    assert [row[0] for row in rows[:7]] == [
        "generic: base",
        "generic: base NF4",
        "generic: adapter",
        "generic: merged",
        "generic: F16",
        "generic: Q4_K_M",
        "mistral: base",
    ]
    # Paired error for conversations of equal length: sd(CHANGES) ÷ √4, times the ratio.
    error = 100 * statistics.stdev(CHANGES) / 2
    expected = [2.5, -51.22, 1.0, 0.0198, 8.8893]
    assert [row[2] for row in rows[:6]] == [
        "",
        *(
            f"{'−' if one < 0 else '+'}{abs(one):.2f} ± {(1 + one / 100) * error:.2f}"
            for one in expected
        ),
    ]
    assert rows[6][2] == ""  # the base of the next run has no source


def test_the_error_of_a_difference_is_far_smaller_than_those_of_the_two_links(write, read_tsv):
    """A conversation is hard or easy for every link: ± 0.18 nats alone, ± 0.012 paired."""
    rows = {row[0]: row for row in read_tsv(write()["tsv"])[1:]}
    change, _, error = rows["generic: Q4_K_M"][2].partition(" ± ")
    assert float(change) > 5 * float(error)


def test_links_that_score_different_tokens_are_not_compared(results, tmp_path, ends_with_message):
    path = results.folder / "runs" / "mistral" / "evaluation" / "F16.tokens.parquet"
    token_scores([1.0, 2.0, 3.0]).write(path)
    argv = results.arguments
    for flag in ("tsv", "markdown", "html", "figure"):
        argv += [f"--{flag}", tmp_path / flag]
    message = ends_with_message(report_chain.main, argv)
    for part in ("different tokens", str(path), "merged.tokens.parquet", "30 of 3", "40 of 4"):
        assert part in message


def test_awq_comes_last_and_is_compared_with_the_merged_model(results):
    for run, perplexity in (("generic", 5.555), ("mistral", 6.05)):
        path = results.folder / "runs" / run / "evaluation" / "awq.json"
        write_link(path, perplexity, place=4)  # merged has place 3
    runs = results.changed(awq=True).read()
    # The comparison still uses the smallest GGUF.
    assert runs[0].smallest.name == "Q4_K_M"
    rows = chain_table.chain(runs).rows
    assert [row[0] for row in rows if "AWQ" in row[0]] == ["generic: AWQ", "mistral: AWQ"]
    assert rows[6][0] == "generic: AWQ" and rows[6][2].startswith("+10.00 ± ")
    # It has the size of its file, but no speed: AWQ's kernels were not timed.
    assert rows[6][3:] == [""] * 6 + ["7.0 MiB"]
    assert rows[13][2].startswith("0.00 ± ")


def test_a_quantization_is_compared_with_f16_and_not_with_the_previous_one(results):
    place = results.folder / "runs" / "generic" / "evaluation"
    write_link(place / "Q2_K.json", 5.8, place=6)
    SPEED.write(place / "Q2_K.inference.json")
    DIVERGENCE.write(place / "Q2_K.divergence.json")
    one = dataclasses.replace(results, settings={"generic": results.settings["generic"]})
    (run,) = one.changed(quantizations=["Q4_K_M", "Q2_K"]).read()
    *_, f16, quantized, quantized_further = run.links
    assert (f16.source, quantized.source, quantized_further.source) == ("merged", "F16", "F16")
    change = list(chain_table.steps(run))[-1]
    assert float(change.split()[0]) == pytest.approx(100 * (5.8 / 5.051 - 1), abs=0.01)


def test_cells_without_a_measurement_are_empty(write, read_tsv):
    rows = {row[0]: row for row in read_tsv(write()["tsv"])[1:]}
    assert rows["generic: Q4_K_M"][3:5] == ["0.01234 ± 0.00056", "92.50 ± 0.31"]
    for link in ("base", "base NF4", "adapter", "merged", "F16"):
        assert rows[f"generic: {link}"][3:5] == ["", ""]
    assert rows["generic: base"][5:] == ["9.88", "", "", "", "7.0 MiB"]
    assert rows["generic: merged"][5:] == ["9.88", "0.123 ± 0.006", "2.500", "3.00 GiB", "5.0 MiB"]
    # llama.cpp does not apply the window, so whole conversations are not scored.
    assert rows["generic: F16"][5:] == ["", "0.123 ± 0.006", "2.500", "3.00 GiB", "5.0 MiB"]


def test_a_small_difference_is_shown_with_two_digits_of_its_error(write, results, read_tsv):
    for path in results.folder.rglob("*.tokens.parquet"):
        token_scores([1.0, 2.0]).write(path)
    f16 = results.folder / "runs" / "generic" / "evaluation" / "F16.tokens.parquet"
    token_scores([1.00002, 2.00003]).write(f16)
    rows = {row[0]: row for row in read_tsv(write()["tsv"])[1:]}
    assert rows["generic: merged"][2] == "0.00 ± 0.00"
    assert rows["generic: F16"][2] == "+0.00250 ± 0.00050"


def test_each_text_has_a_column(write, results, read_tsv):
    base = results.folder / "evaluation" / "tiny" / "texts"
    for number, text in enumerate(("wiki", "code")):
        scores_of(30.0 + number).write(base / text / "base.json")
        for run in ("generic", "mistral"):
            folder = results.folder / "runs" / run / "evaluation" / "texts" / text
            for link in ("merged", "F16", "Q4_K_M"):
                scores_of(20.0 + number).write(folder / f"{link}.json")
    paths = write(results.changed(texts=["wiki", "code"]))
    header, *rows = read_tsv(paths["tsv"])
    assert header[5:8] == ["Perplexity, wiki", "Perplexity, code", "Whole conversations"]
    cells = {row[0]: row[5:7] for row in rows}
    assert cells["generic: base"] == ["30.00 ± 0.30", "31.00 ± 0.31"]
    assert cells["generic: base NF4"] == cells["generic: adapter"] == ["", ""]
    for link in ("merged", "F16", "Q4_K_M"):
        assert cells[f"mistral: {link}"] == ["20.00 ± 0.20", "21.00 ± 0.21"]
    assert "chunks, wiki 34,567, code 34,567 tokens" in paths["md"].read_text()


@pytest.mark.parametrize(("width", "is_told"), [(256, False), (576, True), (4096, False)])
def test_widths_that_rule_out_k_quants_are_explained(write, results, width, is_told):
    FACTS.changed(hidden_size=width).write(results.folder / "models" / "tiny" / "facts.json")
    text = write()["md"].read_text("utf-8")
    assert (f"The rows of tiny have {width} weights." in text) == is_told
    assert ("k-quants" in text) == is_told


def test_the_figure_is_svg_with_links_and_runs(write):
    root = ElementTree.parse(write()["svg"]).getroot()
    assert root.tag.endswith("svg")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20


def test_awq_is_a_separate_point_of_the_figure(write, all_measured):
    assert "<!-- AWQ" not in write()["svg"].read_text()
    figure = write(all_measured)["svg"].read_text()
    assert "<!-- AWQ" in figure


def test_the_same_results_give_the_same_bytes(write):
    first = {key: path.read_bytes() for key, path in write().items()}
    assert {key: path.read_bytes() for key, path in write().items()} == first


def test_other_results_give_another_figure(write, results):
    before = write()["svg"].read_bytes()
    path = results.folder / "runs" / "generic" / "evaluation" / "merged.json"
    files.write_json(path, files.read_json(path) | {"perplexity": 8.0})
    assert write()["svg"].read_bytes() != before


def test_a_single_conversation_without_an_error_is_drawn_too(write, results, read_tsv):
    for path in results.folder.glob("**/evaluation/**/*.json"):
        if "perplexity" in (scores := files.read_json(path)):
            files.write_json(path, scores | {"loss_standard_error_nats_per_token": None})
    paths = write()
    assert read_tsv(paths["tsv"])[1][1] == "10.00"
    assert paths["svg"].stat().st_size > 1000


def test_help_starts_without_torch_or_matplotlib(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_chain")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
