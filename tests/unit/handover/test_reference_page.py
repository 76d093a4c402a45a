from __future__ import annotations

from typing import Any, Literal

import pytest

from tests.conftest import REPOSITORY
from workflow_scripts.handover import reference_page
from workflow_scripts.handover.facts import Facts, FileFacts, RopeStretch
from workflow_scripts.settings import RecipeSettings


def test_the_page_of_records_is_that_of_the_classes() -> None:
    text = (REPOSITORY / reference_page.PAGE).read_text(encoding="utf-8")
    assert text == reference_page.page(), "run `make schema` and commit what it wrote"


def test_a_record_has_its_file_and_every_field_with_its_meaning() -> None:
    text = reference_page.page()
    assert "| `facts.json` | [Facts](#facts) |" in text
    section = text.partition("### Facts\n")[2].partition("\n## ")[0]
    assert section.startswith(
        "\nFile: `facts.json`\n\nShape, tokenizer and files of a checkpoint.\n"
    )
    fields = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert fields == list(Facts.model_fields)
    meaning = "Keys that a query sees, itself included; null is full causal attention."
    assert f"| `sliding_window` | integer or null |  | {meaning} |" in section


def test_a_part_of_other_records_names_no_file() -> None:
    assert reference_page.files_of(Facts) == "`facts.json`"
    assert reference_page.files_of(FileFacts) == ""
    assert reference_page.files_of(RopeStretch) == ""  # a key in backticks, which is no file


def test_a_record_names_its_file_or_is_a_part_of_others() -> None:
    text = reference_page.page()
    records = [
        one for module in reference_page._modules() for one in reference_page.records_of(module)
    ]
    bases = {base for record in records for base in record.__mro__[1:]}
    alone = [
        record.__name__
        for record in records
        if not (
            reference_page.files_of(record) or record in bases or f"[{record.__name__}](#" in text
        )
    ]
    assert alone == []


def test_a_file_that_is_one_mapping_has_no_table() -> None:
    section = reference_page.page().partition("### QuantizationPlan\n")[2].partition("\n## ")[0]
    assert "The file is an object of [TensorTypes](#tensortypes) by name." in section
    assert "| field |" not in section


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("size_bytes", "bytes"),
        ("n_scored_tokens", "tokens"),
        ("prompt_milliseconds_per_token", "milliseconds per token"),
        ("loss_nats_per_token", "nats per token"),
        ("nats_per_answer", "nats per answer"),
        ("score_percent", "percent"),
        ("perplexity", ""),
        ("tests", ""),
    ],
)
def test_the_unit_is_the_end_of_a_name(name: str, unit: str) -> None:
    assert reference_page.unit_of(name) == unit


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "integer"),
        (float | None, "number or null"),
        (Literal["a", "b"], "`a` or `b`"),
        (tuple[int | None, ...], "list of (integer or null)"),
        (tuple[float, float], "list of number, number"),
        (list[str], "list of text"),
        (dict[str, FileFacts], "object of [FileFacts](#filefacts) by name"),
        (dict[str, dict[str, int]], "object of (object of integer by name) by name"),
        (dict[str, Any], "object of any value by name"),
        (RecipeSettings, "object, as `RecipeSettings`"),
    ],
)
def test_a_type_is_told_as_json_has_it(annotation: Any, expected: str) -> None:
    assert reference_page.in_json(annotation) == expected
