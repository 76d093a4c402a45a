from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.scores import scores_of as scores_of_a_link
from tests.training import manifest_of
from workflow_scripts import files
from workflow_scripts.handover.scores import Scores
from workflow_scripts.report import report_sweep, sweep
from workflow_scripts.scoring.token_scores import TokenScores
from workflow_scripts.tokens.documents import Document

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
N_CONVERSATIONS = 12


def summary(tokens: TokenScores) -> Scores:
    """Scores as evaluate_perplexity writes them."""
    return scores_of_a_link(1.0, piece_tokens=512).changed(**dict(tokens.metrics()))


def conversations(shift: float, *, n: int = N_CONVERSATIONS, seed: int = 0, noise: float = 0.01):
    """Scores of conversations whose losses differ by 0.5 nats per token."""
    hardness = np.random.default_rng(0)
    drawn = np.random.default_rng(seed)
    counts = hardness.integers(20, 200, size=n)
    losses = 2 + hardness.normal(0, 0.5, size=n) + shift + drawn.normal(0, noise, size=n)
    return scores_of([np.full(count, loss) for count, loss in zip(counts, losses, strict=True)])


def scores_of(parts: list[np.ndarray]) -> TokenScores:
    """Scores of conversations in which every token except the first is supervised."""
    documents = [
        Document(f"chat/{number}", np.zeros(len(part) + 1, np.int32), np.ones(len(part) + 1, bool))
        for number, part in enumerate(parts)
    ]
    return TokenScores.of(documents, dict(enumerate(parts)))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def add_sweep(folder):
    """Write the results of a sweep, and return its part of `--sweeps`."""

    def add(name, values, shifts, *, n=N_CONVERSATIONS, noise=0.01):
        runs = {}
        for number, (swept, shift) in enumerate(zip(values, shifts, strict=True)):
            run = f"{name}.{number}"
            runs[run] = swept
            results = folder / "results" / "runs" / run
            tokens = conversations(shift, n=n, seed=number, noise=noise)
            tokens.write(results / "evaluation" / "validation.tokens.parquet")
            summary(tokens).write(results / "evaluation" / "validation.json")
            manifest = manifest_of(duration_seconds=100.4 + number, tokens_per_second=2345.6)
            manifest.write(results / "adapter" / "training_manifest.json")
        return {name: {"recipe": f"{name}-recipe", "runs": runs}}

    return add


@pytest.fixture
def arguments(folder):
    def files_of(swept, flag, file):
        runs = [run for one in swept.values() for run in one["runs"]]
        paths = [str(folder / "results" / "runs" / run / file) for run in runs]
        return [flag, *paths] if paths else []

    def make(swept):
        paths = {key: folder / f"sweep.{key}" for key in ("tsv", "md", "html", "svg")}
        return paths, [
            *("--sweeps", json.dumps(swept)),
            *files_of(swept, "--scores", "evaluation/validation.json"),
            *files_of(swept, "--manifests", "adapter/training_manifest.json"),
            *("--tsv", str(paths["tsv"]), "--markdown", str(paths["md"])),
            *("--html", str(paths["html"]), "--figure", str(paths["svg"])),
        ]

    return make


@pytest.fixture
def write(arguments):
    def run(swept):
        paths, argv = arguments(swept)
        report_sweep.main(argv)
        return paths

    return run


@pytest.fixture
def rates(add_sweep):
    values = [{"learning_rate": rate} for rate in RATES]
    return lambda **more: add_sweep("rates", values, (0.2, 0.001, 0.0, 0.1), **more)


def test_runs_are_ranked_and_significant_differences_marked(write, rates, read_tsv):
    header, *rows = read_tsv(write(rates())["tsv"])
    assert header == [
        "run",
        "learning_rate",
        "perplexity",
        "vs. the best, %",
        "significant",
        "training, s",
        "tokens/s",
        "peak memory",
    ]
    assert [row[1] for row in rows] == ["4e-3", "2e-3", "8e-3", "1e-3"]
    assert [row[4] for row in rows] == ["", "no", "yes", "yes"]
    assert rows[0][3] == "best"
    assert rows[0][5:] == ["102", "2,346", "1.50 GiB"]
    # 0.2 nats worse, apart from the noise: exp(0.2) − 1 is 22 %.
    assert float(rows[3][3].split()[0]) == pytest.approx(22.1, abs=2)


def test_the_conclusion_says_what_to_copy_and_which_runs_are_as_good(write, rates):
    paths = write(rates())
    for last in (
        paths["md"].read_text().strip().splitlines()[-1],
        re.findall("<p>.*</p>", paths["html"].read_text())[-1],
    ):
        assert "Copy into recipes.rates-recipe: learning_rate: 4e-3" in last
        assert "Best: rates.2, not significantly better than rates.1." in last
        assert "rates.0" not in last


def test_pairing_finds_differences_that_separate_errors_hide(write, rates, read_tsv):
    paths = write(rates())
    assert "is paired token by token" in paths["md"].read_text()
    rows = read_tsv(paths["tsv"])[1:]
    assert [row[4] for row in rows] == ["", "no", "yes", "yes"]
    # The twelve conversations differ by 0.5 nats, so the intervals of best and worst overlap.
    best, worst = ([float(part) for part in row[2].split(" ± ")] for row in (rows[0], rows[-1]))
    assert worst[0] - best[0] < worst[1] + best[1]


def test_the_interval_of_a_difference_is_students_over_conversations(write, rates, read_tsv):
    row = next(row for row in read_tsv(write(rates())["tsv"])[1:] if row[0] == "rates.0")
    worst, best = conversations(0.2, seed=0), conversations(0.0, seed=2)
    mean, error = worst.difference(best)
    half_width = 100 * math.exp(mean) * 2.201 * error  # t with 11 degrees of freedom
    assert row[3] == f"+{100 * (math.exp(mean) - 1):.2f} ± {half_width:.2f}"


def test_with_one_conversation_no_difference_is_significant(write, rates, read_tsv):
    rows = read_tsv(write(rates(n=1))["tsv"])[1:]
    assert [row[4] for row in rows] == ["", "no", "no", "no"]
    assert "±" not in "".join(rows[1])


@pytest.mark.parametrize("changed", ["tokens", "pieces"])
def test_runs_scored_on_different_tokens_are_not_compared(
    arguments, rates, folder, ends_with_message, changed
):
    swept = rates()
    evaluation = folder / "results" / "runs" / "rates.2" / "evaluation"
    if changed == "tokens":
        conversations(0.0, n=11).write(evaluation / "validation.tokens.parquet")
    else:
        path = evaluation / "validation.json"
        files.write_json(path, files.read_json(path) | {"piece_tokens": 256})
    message = ends_with_message(report_sweep.main, arguments(swept)[1])
    for part in ("different tokens", "rates.2", "rates.0", "evaluate_validation"):
        assert part in message


def test_no_sweep_is_a_stage_error(arguments, ends_with_message):
    message = ends_with_message(report_sweep.main, arguments({})[1])
    assert "no sweep" in message and "sweep: true" in message


def test_a_value_of_the_best_run_is_written_as_in_the_config(write, add_sweep):
    values = [
        {"target_modules": ["q_proj", "v_proj"], "dora": True, "max_steps": None},
        {"target_modules": "all-linear", "dora": False, "max_steps": 40},
    ]
    text = write(add_sweep("modules", values, (0.0, 0.3)))["md"].read_text()
    assert "target_modules: [q_proj, v_proj], dora: true, max_steps: null" in text
    assert "Best: modules.0, significantly better than every other run." in text


def texts(path) -> str:
    """The SVG as text. matplotlib draws text as shapes and keeps the text in comments."""
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    return path.read_text()


def test_one_numeric_key_is_a_curve_over_its_values(write, rates):
    text = texts(write(rates())["svg"])
    for part in ("learning_rate", *("1e-3", "2e-3", "4e-3", "8e-3"), "best run"):
        assert f"<!-- {part} -->" in text


@pytest.mark.parametrize(
    "values",
    [
        [{"dora": True}, {"dora": False}],
        [{"kv_rank": "matched"}, {"kv_rank": 4}],
        [{"rank": 8, "alpha": 16.0}, {"rank": 16, "alpha": 16.0}],
    ],
    ids=["a switch", "a word", "two keys"],
)
def test_other_sweeps_are_drawn_with_one_line_per_run(write, add_sweep, values):
    text = texts(write(add_sweep("others", values, (0.1, 0.0)))["svg"])
    for swept in values:
        shown = ", ".join(f"{key} {sweep.as_written(one)}" for key, one in swept.items())
        assert f"<!-- {shown} -->" in text


def test_several_sweeps_are_ranked_separately_with_a_panel_each(write, rates, add_sweep, read_tsv):
    ranks = add_sweep("ranks", [{"rank": 4}, {"rank": 16}], (0.0, 0.3))
    paths = write(rates() | ranks)
    header, *rows = read_tsv(paths["tsv"])
    assert header[1:3] == ["learning_rate", "rank"]
    assert [row[1] for row in rows] == ["4e-3", "2e-3", "8e-3", "1e-3", "", ""]
    assert [row[2] for row in rows] == ["", "", "", "", "4", "16"]
    assert [row[4] for row in rows if row[1]] == ["best", *[rows[at][4] for at in (1, 2, 3)]]
    text = paths["md"].read_text()
    for recipe, value in (("rates", "learning_rate: 4e-3"), ("ranks", "rank: 4")):
        assert f"Copy into recipes.{recipe}-recipe: {value}" in text
    for title in ("rates", "ranks"):
        assert f"<!-- {title} -->" in texts(paths["svg"])


def test_the_same_results_give_the_same_bytes(write, rates):
    first = {key: path.read_bytes() for key, path in write(rates()).items()}
    assert {key: path.read_bytes() for key, path in write(rates()).items()} == first


def test_the_caption_says_that_the_test_split_is_not_used():
    caption = Path(report_sweep.__file__).with_name("captions").joinpath("sweep.rst").read_text()
    assert "The test split\nis not used" in caption


def test_help_starts_without_torch_or_matplotlib(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_sweep")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib", "numpy"}
