"""Reports of the data stages and answers of links, for tests."""

from __future__ import annotations

from workflow_scripts.handover.answers import Answer, Answers
from workflow_scripts.handover.cleaning import CleaningReport, Histogram, SourceCounts
from workflow_scripts.handover.packing import PackingReport

CLEANING = CleaningReport(
    n_read=60,
    n_corrected=5,
    n_train=40,
    n_validation=4,
    n_test=5,
    n_train_weighted=40,
    n_with_reference=0,
    n_rejected=11,
    rejected_by_reason={"duplicate": 8, "too short": 3},
    corrections={"Unicode repaired": 5},
    by_source={"chats": SourceCounts(n_read=60, n_kept=49, n_rejected=11, weight=1.0)},
    roles={"user": 49, "assistant": 49},
    n_messages={2: 49},
    characters_histogram=Histogram(edges=(0, 16), counts=(0, 49)),
    languages={"en": 49},
    n_language_sample=49,
    personal_data={},
    held_out_fractions={"validation": 0.08, "test": 0.1},
)
PACKING = PackingReport(
    strategy="best_fit",
    row_tokens=256,
    sliding_window=64,
    n_documents=34,
    n_documents_placed=34,
    n_pieces=35,
    n_rows=12,
    n_tokens=2976,
    n_context_tokens=0,
    n_supervised_tokens=1234,
    fill_fraction=0.96875,
    n_documents_cut=1,
    n_documents_beyond_window=2,
    attention_pairs=150_000,
    training_flops=1e12,
    attention_flops_fraction=0.1,
    none_padding_fraction=0.1,
    none_random_order_padding_fraction=0.5,
    step_imbalance_8_ranks=1.01,
    step_imbalance_8_ranks_random_order=1.04,
    n_documents_split=1,
    n_documents_truncated=0,
    n_documents_dropped=0,
    n_cuts_at_turn=1,
    n_cuts_at_sentence=0,
    n_cuts_at_token=0,
    n_pieces_without_supervision=0,
    n_tokens_left_out=0,
)


def answers_of(
    link: str, *, n: int, prompt: str, reference: str, answer: str, n_ended: int
) -> Answers:
    """Answers to several prompts. Texts may name the `{link}` and the prompt's `{number}`.

    Args:
        n_ended: number of answers, from the first, that ended before the length limit.
    """
    return Answers(
        answers=tuple(
            Answer(
                conversation=f"chat/{number}",
                prompt=prompt.format(number=number),
                reference=reference.format(number=number),
                answer=answer.format(link=link, number=number),
                n_tokens=6,
                is_ended=number < n_ended,
                is_reference=False,
            )
            for number in range(n)
        ),
        duration_seconds=1.0,
    )
