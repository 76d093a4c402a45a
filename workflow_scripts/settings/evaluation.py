"""`evaluation`: what is measured, on how much, and what a hand-over may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from workflow_scripts.settings.fields import Count, Fraction, Name, NonNegative, Positive, Settings

# A task of the harness, and how many examples stand before each question of it.
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*(@[0-9]+)?$")]


class TokensGateSettings(Settings):
    """`evaluation.gates.tokens`: the sample that `check_tokens` compares."""

    n_conversations: Count | None = 1000
    """Conversations whose tokens are compared with those of mistral-common and with those of the
    tokenizer that ships; null is all."""


class MergeBaseGateSettings(Settings):
    """`evaluation.gates.merge_base`: what `choose_merge_base` measures on (`merge_base: auto`)."""

    n_conversations: Count = 20
    """Validation conversations on which both candidates are scored."""


class MergeGateSettings(Settings):
    """`evaluation.gates.merge`: what `check_merged` accepts."""

    perplexity_increase_fraction: Fraction = 0.005
    """Largest increase of perplexity over the run as it was trained (its base in 4, 8 or 16 bits);
    a decrease is always accepted."""
    n_conversations: Count = 20
    """Validation conversations that are scored."""


class GgufGateSettings(Settings):
    """`evaluation.gates.gguf`: what `check_gguf` accepts."""

    kl_divergence_nats: Positive = 1e-5
    """Largest mean KL divergence per token of the F16 GGUF from the merged model, within the
    window."""
    n_conversations: Count = 20
    """Validation conversations that are scored."""
    parity_conversations: Count | None = 1000
    """Validation conversations that the GGUF's own template and tokenizer render, to compare with
    the tokens of training; null is all."""


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
    """`evaluation.inference`: how speed is measured, in llama-bench's terms."""

    prompt_tokens: Count = 512
    """Prompt processing, `pp512`."""
    generated_tokens: Count = 64
    """Decoding, `tg64`."""
    repetitions: Count = 3
    """Measured passes after one to warm up; mean and standard deviation are kept."""
    depths_tokens: Annotated[list[NonNegative], Field(min_length=1)] = [0]
    """Tokens of context before each pass, llama-bench's `-d`; those that leave no room in the
    context are passed over. Tables show the first."""


class RecallSettings(Settings):
    """`evaluation.recall`: facts to be found in prompts of held-out text (`snakemake
    experiment`)."""

    lengths_tokens: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths of the prompts with their answers, tokens; null is a quarter, a half, one, two and
    four windows (a sixteenth to the whole of the context of a model without one)."""
    depths: Annotated[list[Fraction], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact stands: 0 is its beginning, 1 just before the question."""
    n_prompts: NonNegative = 20
    """Prompts of each length and depth; 0 leaves recall out."""
    seed: NonNegative = 0
    """Which texts and facts."""


class ContextSettings(Settings):
    """`evaluation.context`: how much of the context is usable (`snakemake context`)."""

    use: bool = False
    """Measured by `snakemake` alone as well, for the headline table and each run's page; on a 7B
    that is more prompts than everything else together."""
    of_merged: bool = True
    """Also measured on the merged model, next to the base and the last quantization."""
    tasks: Annotated[
        list[Literal["single", "multi_key", "variable_tracing"]], Field(min_length=1)
    ] = ["single", "multi_key", "variable_tracing"]
    """After RULER: a fact in the text, one among others like it, a chain of variables."""
    lengths_tokens: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths of the prompts with their answers, tokens; null doubles from 1/64 of the context to
    the whole."""
    depths: Annotated[list[Fraction], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact stands."""
    n_prompts: Count = 10
    """Prompts of each task, length and depth."""
    files: list[str] = []
    """Text files that the prompts are filled with; none is Python's own documentation."""
    short_tokens: Count = 2048
    """Context against which the whole is held: what does a test conversation gain by the rest?"""
    n_long_conversations: NonNegative = 50
    """Test conversations longer than `short_tokens` that this is measured on, at most; 0 leaves it
    out."""
    seed: NonNegative = 0
    """Which texts and facts."""


class SampleSettings(Settings):
    """`evaluation.samples`: answers to read (`snakemake samples`)."""

    use: bool = False
    """Answered by `snakemake` alone as well, for the overview: base, tuned model (F16) and smallest
    quantization side by side."""
    n_prompts: Count = 5
    """Prompts: the first of the test split, by id, that leave room for an answer."""
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
    """Whether prompts become chats, examples turns; published scores of base models are without."""
    max_answer_tokens: Count = 64
    """Longest answer to a prompt whose chat marks a reference answer, tokens."""

    @model_validator(mode="after")
    def _a_task_stands_once(self) -> TaskSettings:
        names = [name.partition("@")[0] for name in self.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`names`: {', '.join(twice)} stands twice")
        return self


class EvaluationSettings(Settings):
    """`evaluation`: what is measured, on how much."""

    piece_tokens: Annotated[Count, Field(ge=16)] | None = None
    """Longest piece scored along the chain, tokens; null is the sliding window, else the
    context."""
    full_length: bool = True
    """Conversations longer than a piece are also scored whole, by the links that honour the
    window."""
    max_conversations: Count | None = None
    """Conversations scored, the first of the split's order (`test` along the chain, `validation`
    by position); null is all."""
    base_gguf: bool = False
    """The base's own F16 GGUF is a link of the chain too: what llama.cpp alone changes, before any
    training."""
    texts: dict[Name, str] = {}
    """Text files that the links are scored on as llama-perplexity scores them, by name:
    `{wikitext: data/wiki.test.raw}`."""
    text_context_tokens: Annotated[Count, Field(ge=16)] = 512
    """Length of the chunks of `texts`, whose second half is scored; llama-perplexity's `-c`."""
    gates: GateSettings = GateSettings()
    """Samples and thresholds of the gates."""
    inference: InferenceSettings = InferenceSettings()
    """Speed and memory."""
    recall: RecallSettings = RecallSettings()
    """Facts found again."""
    context: ContextSettings = ContextSettings()
    """Usable context."""
    samples: SampleSettings = SampleSettings()
    """Answers to be read."""
    tasks: TaskSettings = TaskSettings()
    """Tasks with a right answer."""
