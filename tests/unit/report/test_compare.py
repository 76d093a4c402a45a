from __future__ import annotations

import pytest

from tests.unit.report.conftest import token_scores
from workflow_scripts import files
from workflow_scripts.report import collect_metrics, compare


@pytest.fixture
def collected(results):
    folders = [results.folder / "runs" / name for name in ("generic", "mistral")]
    for folder in folders:
        collect_metrics.main(
            [*results.by_run[folder.name], "--metrics", str(folder / "metrics.json")]
        )
    return folders


def rows(text, link):
    section = text.split(f"### {link}\n")[1].split("\n###")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_two_runs_are_printed_side_by_side_with_their_differences(collected, capsys):
    compare.main(list(map(str, collected)))
    text = capsys.readouterr().out
    merged = rows(text, "merged")
    assert merged[""] == ["generic", "mistral", "difference"]
    assert merged["perplexity, paired by token, %"][2] == "+19.80 ± 0.00"
    assert merged["perplexity"][:2] == ["5.0500", "6.0500"]
    assert merged["loss, nats/token"] == ["1.619 ± 0.010", "1.800 ± 0.010", "+0.181 ± 0.014"]
    run = rows(text, "run")
    assert run["steps of training"] == ["7", "8", "+1"]
    assert run["rows"][2] == "0"


def test_swapping_the_runs_changes_the_signs(collected, capsys):
    compare.main(list(map(str, reversed(collected))))
    merged = rows(capsys.readouterr().out, "merged")
    assert merged["loss, nats/token"][2] == "−0.181 ± 0.014"
    assert merged["perplexity"][2].startswith("−1.000")
    # 5.05 ÷ 6.05 − 1, not −19.80: the reference is now the other run.
    assert merged["perplexity, paired by token, %"][2] == "−16.53 ± 0.00"


def test_losses_of_other_tokens_are_not_paired(collected, capsys):
    of_two = token_scores((0.5, 0.25))  # the other run has four conversations
    of_two.write(collected[1] / "evaluation" / "merged.tokens.parquet")
    compare.main(list(map(str, collected)))
    text = capsys.readouterr().out
    assert "perplexity, paired by token, %" not in rows(text, "merged")
    assert "perplexity, paired by token, %" in rows(text, "F16")


@pytest.mark.parametrize("place", [0, 1])
def test_figures_of_only_one_run_are_left_out(collected, capsys, place):
    path = collected[place] / "metrics.json"
    metrics = files.read_json(path)
    del metrics["links"]["Q4_K_M"]
    del metrics["links"]["merged"]["decode time"]
    files.write_json(path, metrics)
    compare.main(list(map(str, collected)))
    text = capsys.readouterr().out
    assert "### Q4_K_M" not in text and "### F16" in text
    merged = rows(text, "merged")
    assert "decode time, ms/token" not in merged and "prompt time, ms/token" in merged


def test_the_same_run_in_two_folders_is_named_by_folder(collected, tmp_path, capsys):
    import shutil

    other = shutil.copytree(collected[0], tmp_path / "elsewhere" / "generic")
    compare.main([str(collected[0]), str(other)])
    assert str(other) in capsys.readouterr().out


def test_a_run_without_metrics_is_a_stage_error(collected, tmp_path, ends_with_message):
    message = ends_with_message(compare.main, [collected[0], tmp_path])
    assert "the run has no metrics" in message and "snakemake --cores 8 report" in message
