from __future__ import annotations

import pytest

from tests.gates import DEQUANTIZED
from tests.tasks import reference_scores
from tests.unit.report.conftest import FACTS
from workflow_scripts.report import report_comparison


@pytest.fixture
def write(results, tmp_path):
    def run(results=results):
        paths = {key: tmp_path / f"comparison.{key}" for key in ("tsv", "md", "html")}
        report_comparison.main(
            [*results.arguments, "--tsv", str(paths["tsv"])]
            + ["--markdown", str(paths["md"]), "--html", str(paths["html"])]
        )
        return paths

    return run


def test_the_table_has_one_column_per_run_and_one_row_per_figure(write, read_tsv):
    cells = read_tsv(write()["tsv"])
    assert cells == [
        ["", "generic", "mistral"],
        ["Perplexity, base", "10.00 ± 0.10", "10.00 ± 0.10"],
        ["Perplexity, merged", "5.05 ± 0.05", "6.05 ± 0.06"],
        ["Perplexity, Q4_K_M", "5.50 ± 0.06", "6.50 ± 0.07"],
        ["Change from the base", "−49.5%", "−39.5%"],
        ["Prompt, Q4_K_M, ms/token", "0.123 ± 0.006", "0.123 ± 0.006"],
        ["Decode, Q4_K_M, ms/token", "2.500", "2.500"],
        ["File, Q4_K_M", "7.0 MiB", "7.0 MiB"],
        ["Memory of inference, Q4_K_M", "3.00 GiB", "3.00 GiB"],
        ["Memory of training, predicted", "1.25 GiB", "2.50 GiB"],
        ["Memory of training, measured", "1.50 GiB", "3.00 GiB"],
        ["Training, tokens/s", "1,234", "1,234"],
        ["Training, steps", "7", "8"],
        ["Trainable parameters", "1,234,567", "1,234,567"],
        ["Context, transformers", "2,048", "2,048"],
        ["Context, GGUF", "64", "64"],
    ]


def test_texts_and_usable_context_have_rows_if_they_were_measured(write, all_measured, read_tsv):
    paths = write(all_measured)
    cells = {name: figures for name, *figures in read_tsv(paths["tsv"])}
    assert cells["Perplexity on wiki, base"] == ["20.00 ± 0.20"] * 2
    assert cells["Perplexity on wiki, Q4_K_M"] == ["21.20 ± 0.21", "22.20 ± 0.22"]
    assert cells["Usable context, base"] == ["1,024 / 4,096 (512–2,048)"] * 2
    assert cells["Usable context, Q4_K_M"] == ["1,024 / 4,096 (512–2,048)", "not measurable"]
    text = paths["md"].read_text()
    assert "40 or 60 prompts per link" in text and "`snakemake context`" not in text


def test_tasks_have_rows_if_they_were_evaluated(write, results, all_measured, read_tsv):
    assert (
        "`snakemake tasks` measures tasks with a right answer" in write(results)["md"].read_text()
    )
    paths = write(all_measured)
    rows = [row for row in read_tsv(paths["tsv"]) if "hellaswag" in row[0] or "answers" in row[0]]
    assert rows == [
        ["hellaswag acc_norm, 10-shot, %, base", "25.00 ± 24.00", "25.00 ± 24.00"],
        ["hellaswag acc_norm, 10-shot, %, merged", "50.00 ± 23.00", "75.00 ± 22.00"],
        ["hellaswag acc_norm, 10-shot, %, Q4_K_M", "25.00 ± 24.00", "50.00 ± 23.00"],
        *(
            [f"reference answers exact_match, %, {link}", *(f"{one} [10.00, 90.00]" for one in two)]
            for link, two in (
                ("base", ("20.00", "20.00")),
                ("merged", ("40.00", "60.00")),
                ("Q4_K_M", ("20.00", "40.00")),
            )
        ),
    ]
    text = paths["md"].read_text()
    assert "95 % Wilson" in text and "`snakemake tasks`" not in text


def test_a_dataset_that_marks_no_reference_has_an_empty_cell(write, all_measured, read_tsv):
    folder = all_measured.folder / "runs"
    for link in ("merged", "Q4_K_M"):
        path = folder / "generic" / "evaluation" / f"{link}.references.json"
        reference_scores().write(path)
    cells = {name: figures for name, *figures in read_tsv(write(all_measured)["tsv"])}
    name = "reference answers exact_match, %, merged"
    assert cells[name] == ["", "60.00 [10.00, 90.00]"]


def test_a_run_that_was_not_trained_here_has_empty_cells(results, tmp_path, read_tsv):
    given = {"packing": None, "recipe": None, "merged": "owner/model"}
    results = results.changed({"mistral": given})
    (results.folder / "runs" / "mistral" / "adapter" / "training_manifest.json").unlink()
    paths = [tmp_path / f"comparison.{form}" for form in ("tsv", "md", "html")]
    report_comparison.main(
        [*results.arguments, "--tsv", str(paths[0])]
        + ["--markdown", str(paths[1]), "--html", str(paths[2])]
    )
    cells = {name: figures for name, *figures in read_tsv(paths[0])}
    for name in ("Training, steps", "Training, tokens/s", "Trainable parameters"):
        assert cells[name][0] and not cells[name][1]
    assert cells["Memory of training, measured"] == ["1.50 GiB", ""]
    assert cells["Perplexity, merged"][1] == "6.05 ± 0.06"


def test_measurements_of_both_merge_bases_are_shown(results, tmp_path, read_tsv):
    results = results.changed({"mistral": {"merge_base": "auto"}})
    DEQUANTIZED.write(results.folder / "runs" / "mistral" / "merge_base.json")
    paths = [tmp_path / f"comparison.{form}" for form in ("tsv", "md", "html")]
    report_comparison.main(
        [*results.arguments, "--tsv", str(paths[0])]
        + ["--markdown", str(paths[1]), "--html", str(paths[2])]
    )
    assert read_tsv(paths[0])[-4:] == [
        ["Merged into", "original", "dequantized (measured)"],
        ["Validation, live adapter: perplexity", "", "5.0000"],
        [
            "Validation, merged into the original: perplexity, KL",
            "",
            "5.1250, 0.012 nats",
        ],
        [
            "Validation, merged into the dequantized: perplexity, KL",
            "",
            "5.0625, 0.00045 nats",
        ],
    ]


def test_the_note_describes_the_test_split(write):
    text = write()["md"].read_text()
    for part in ("12 conversations", "34,567 supervised tokens", "at most 64 tokens"):
        assert part in text


def test_a_model_without_a_window_serves_its_whole_context(write, results, read_tsv):
    path = results.folder / "models" / "tiny" / "facts.json"
    FACTS.changed(sliding_window=None).write(path)
    assert read_tsv(write()["tsv"])[-1] == ["Context, GGUF", "2,048", "2,048"]


def test_the_same_results_give_the_same_bytes(write):
    first = {key: path.read_bytes() for key, path in write().items()}
    assert {key: path.read_bytes() for key, path in write().items()} == first


def test_help_starts_without_torch_or_matplotlib(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_comparison")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
