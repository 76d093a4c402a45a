"""`evaluation`: what is measured, on how many conversations, and what gates accept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from workflow_scripts.settings.fields import Count, Fraction, Name, NonNegative, Positive, Settings

# A task of lm-evaluation-harness and, after @, the number of few-shot examples.
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*(@[0-9]+)?$")]


class TokensGateSettings(Settings):
    """`evaluation.gates.tokens`: the sample that `check_tokens` compares."""

    n_conversations: Count | None = 1000
    """Conversations whose tokens are compared with those of mistral-common and of the tokenizer
    that ships; null is all."""


class MergeBaseGateSettings(Settings):
    """`evaluation.gates.merge_base`: what `choose_merge_base` measures (`merge_base: auto`)."""

    n_conversations: Count = 20
    """Validation conversations on which both bases are scored."""


class MergeGateSettings(Settings):
    """`evaluation.gates.merge`: what `check_merged` accepts."""

    perplexity_increase_fraction: Fraction = 0.005
    """Largest accepted increase of perplexity over the model as it was trained (with its base in 4,
    8 or 16 bits), beyond two standard errors. A decrease is always accepted."""
    n_conversations: Count = 20
    """Validation conversations that are scored."""


class GgufGateSettings(Settings):
    """`evaluation.gates.gguf`: what `check_gguf` accepts."""

    kl_divergence_nats: Positive = 1e-5
    """Largest accepted mean KL divergence of the F16 GGUF from the merged model, nats per token,
    within the window."""
    n_conversations: Count = 20
    """Validation conversations that are scored."""
    parity_conversations: Count | None = 1000
    """Validation conversations whose tokens, by the GGUF's own template and tokenizer, are compared
    with the tokens of training; null is all."""


class GateSettings(Settings):
    """`evaluation.gates`: one table per gate; a change to one re-runs that gate alone."""

    tokens: TokensGateSettings = TokensGateSettings()
    """Tokens of the dataset."""
    merge_base: MergeBaseGateSettings = MergeBaseGateSettings()
    """Choice of the base to merge into."""
    merge: MergeGateSettings = MergeGateSettings()
    """The merged model."""
    gguf: GgufGateSettings = GgufGateSettings()
    """The F16 GGUF."""


class InferenceSettings(Settings):
    """`evaluation.inference`: how speed is measured, in the terms of llama-bench."""

    prompt_tokens: Count = 512
    """Tokens of the prompt that is processed, `pp512`."""
    generated_tokens: Count = 64
    """Tokens that are generated, `tg64`."""
    repetitions: Count = 3
    """Measured passes, after one pass to warm up. The mean and the standard deviation are kept."""
    depths_tokens: Annotated[list[NonNegative], Field(min_length=1)] = [0]
    """Tokens in the context before each pass (`-d` of llama-bench). Depths that leave no room in
    the context are skipped. Tables show the first."""


class RecallSettings(Settings):
    """`evaluation.recall`: facts to find in prompts of held-out text (`snakemake
    experiment`)."""

    lengths_tokens: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths of the prompts with their answers, tokens; null is 1/4, 1/2, 1, 2 and 4
    windows (without a window: 1/16 to all of the context)."""
    depths: Annotated[list[Fraction], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact is: 0 is the beginning, 1 is just before the question."""
    n_prompts: NonNegative = 20
    """Prompts for each length and depth; 0 leaves recall out."""
    seed: NonNegative = 0
    """Seed of the choice of texts and facts."""


class ContextSettings(Settings):
    """`evaluation.context`: how much of the context is usable (`snakemake context`)."""

    use: bool = False
    """Measure it in every build, for the headline table and each run's page. On a 7B this takes
    more prompts than everything else together."""
    of_merged: bool = True
    """Measure the merged model too, besides the base and the last quantization."""
    tasks: Annotated[
        list[Literal["single", "multi_key", "variable_tracing"]], Field(min_length=1)
    ] = ["single", "multi_key", "variable_tracing"]
    """Tasks after RULER: find a fact, find one among similar facts, follow a chain of variables."""
    lengths_tokens: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths of the prompts with their answers, tokens; null doubles from 1/64 of the context to
    all of it."""
    depths: Annotated[list[Fraction], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact is, from 0 (beginning) to 1 (end)."""
    n_prompts: Count = 10
    """Prompts for each task, length and depth."""
    files: list[str] = []
    """Text files that fill the prompts; without any, Python's own documentation does."""
    short_tokens: Count = 2048
    """Length of the short context that the full context is compared with, tokens."""
    n_long_conversations: NonNegative = 50
    """Largest number of test conversations longer than `short_tokens` for that comparison; 0 leaves
    it out."""
    seed: NonNegative = 0
    """Seed of the choice of texts and facts."""


class SampleSettings(Settings):
    """`evaluation.samples`: answers to read (`snakemake samples`)."""

    use: bool = False
    """Answer prompts in every build, for the overview: base, tuned model (F16) and smallest
    quantization side by side."""
    n_prompts: Count = 5
    """Number of prompts: the first conversations of the test split, by id, that leave room for an
    answer."""
    max_tokens: Count = 128
    """Longest answer, tokens."""


class TaskSettings(Settings):
    """`evaluation.tasks`: tasks with a right answer (`snakemake tasks`): reference answers of the
    chats, and published ones by lm-evaluation-harness."""

    use: bool = False
    """Scored by `snakemake` alone as well, for the headline table, the metrics and each run's page;
    with `names`, `snakemake` then runs where the harness is (`.venv-tasks`, or `--sdm conda`)."""
    names: list[TaskName] = []
    """Its tasks, groups or tags; none by default. `mmlu`, `hellaswag`, `arc_challenge`, `triviaqa`
    and `gsm8k` come with 5, 10, 25, 5 and 8 examples, any other with what its file says; `@n` after
    a name asks for n."""
    include: str | None = None
    """Folder of task files of your own, in its YAML."""
    limit: Count | None = None
    """Documents of each task, the first; null is all, which published scores need."""
    chat_template: bool = False
    """Format prompts as chats and examples as turns. Published scores of base models do not."""
    max_answer_tokens: Count = 64
    """Longest answer to a prompt whose chat marks a reference answer, tokens."""

    @model_validator(mode="after")
    def _a_task_stands_once(self) -> TaskSettings:
        names = [name.partition("@")[0] for name in self.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`names`: {', '.join(twice)} is named twice")
        return self


class EvaluationSettings(Settings):
    """`evaluation`: what is measured, and on how many conversations."""

    piece_tokens: Annotated[Count, Field(ge=16)] | None = None
    """Longest piece that the links of the chain score, tokens; null is the sliding window or,
    without one, the context."""
    full_length: bool = True
    """Also score conversations longer than a piece as a whole, by the links that apply the
    window."""
    max_conversations: Count | None = None
    """Largest number of conversations scored, the first in the order of the split (`test` along the
    chain, `validation` by position); null is all."""
    base_gguf: bool = False
    """Add the base's own F16 GGUF to the chain. It shows what llama.cpp alone changes, before any
    training."""
    texts: dict[Name, str] = {}
    """Text files by name that every link is scored on, in the way of llama-perplexity:
    `{wikitext: data/wiki.test.raw}`."""
    text_context_tokens: Annotated[Count, Field(ge=16)] = 512
    """Length of the chunks of `texts` (`-c` of llama-perplexity); the second half of each is
    scored."""
    gates: GateSettings = GateSettings()
    """Samples and thresholds of the gates."""
    inference: InferenceSettings = InferenceSettings()
    """Speed and memory."""
    recall: RecallSettings = RecallSettings()
    """Recall of facts."""
    context: ContextSettings = ContextSettings()
    """Usable context."""
    samples: SampleSettings = SampleSettings()
    """Answers to read."""
    tasks: TaskSettings = TaskSettings()
    """Tasks with a right answer."""
