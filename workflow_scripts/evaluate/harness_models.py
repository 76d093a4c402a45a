"""The links of the chain as models of lm-evaluation-harness. Importing this needs the harness.

Every link uses the exported tokenizer, so that all score the same token ids: llama.cpp's own would
leave out the space that SentencePiece puts before a text. BOS comes first, and only once, even if a
chat template has already written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from transformers import AutoTokenizer

from workflow_scripts.evaluate.greedy import Greedy
from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

LogitBlocks = Callable[[np.ndarray, np.ndarray], Iterator[Tensor]]
# Texts of the pair, tokens of the context, tokens of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
MAX_ANSWER_TOKENS = 256  # the harness's default for tasks that set none
# Logits of a batch with 4,096 tokens per row: 2 GiB in 16 bits.
BATCH_ELEMENTS = 2**30


def load_tokenizer(folder: Path) -> Any:
    """Return the exported tokenizer, loaded by transformers."""
    return AutoTokenizer.from_pretrained(str(folder))


class TransformersLM(HFLM):
    """A loaded transformers model.

    Args:
        model: loaded in the precision that is measured.
        tokenizer: from `load_tokenizer`.
        max_length: limit for context and continuation, tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int) -> None:
        n_vocabulary = model.config.vocab_size
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=max_length,
            add_bos_token=True,
            # In bfloat16 a log-probability has two digits, so choices tie.
            softmax_dtype="float32",
            batch_size=1
            if model.device.type == "cpu"
            else max(1, BATCH_ELEMENTS // (4096 * n_vocabulary)),
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        # The windows begin with BOS; with the tokenizer's there would be two, and the second would
        # be scored (lm-evaluation-harness #3333).
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = True

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            room_for_context(self.max_length, request.args[1])
        return super().generate_until(requests, disable_tqdm)


class LogitLM(TemplateLM):
    """A model that gives logits and greedy answers: llama.cpp, in this process.

    Args:
        logit_blocks: method of a `LogitModel`; called in an order that puts inputs with the same
            beginning next to each other.
        greedy: answers a prompt.
        tokenizer: from `load_tokenizer`.
        max_length: limit for context and continuation, tokens.
    """

    def __init__(
        self, logit_blocks: LogitBlocks, greedy: Greedy, tokenizer: Any, *, max_length: int
    ) -> None:
        super().__init__()
        self._logit_blocks = logit_blocks
        self._greedy = greedy
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.bos_token)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and True if greedy decoding gives it."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for number, (_text, context, continuation) in enumerate(requests):
            assert context and continuation, requests[number]
            if len(continuation) > self.max_length:
                raise StageError(
                    "a continuation that a task scores is longer than the context",
                    found=f"{len(continuation)} tokens: {requests[number][0]}"[:200],
                    expected=f"at most {self.max_length}",
                )
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            by_input.setdefault(tuple(tokens), []).append(number)
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        for shared in sorted(by_input):
            continuations = {number: requests[number][2] for number in by_input[shared]}
            for number, answer in self._score(np.array(shared), continuations).items():
                found[number] = answer
        return [answer for answer in found if answer is not None]

    def _score(
        self, tokens: np.ndarray, continuations: dict[int, list[int]]
    ) -> dict[int, tuple[float, bool]]:
        """Score continuations that all end one token after the same input.

        Args:
            tokens: (n,) input.
            continuations: tokens of each, which the last positions of the input predict.
        """
        longest = max(map(len, continuations.values()))
        log_likelihoods = dict.fromkeys(continuations, 0.0)
        are_greedy = dict.fromkeys(continuations, True)
        first = len(tokens) - longest  # position of a block's first row
        for logits in self._logit_blocks(tokens, np.arange(first, len(tokens))):
            normalizers = torch.logsumexp(logits, dim=-1)
            likeliest = logits.argmax(dim=-1)
            for number, continuation in continuations.items():
                begins = len(tokens) - len(continuation)
                rows = slice(max(0, begins - first), None)
                targets = torch.tensor(continuation)[max(0, first - begins) :][: len(logits[rows])]
                chosen = logits[rows].gather(1, targets[:, None])[:, 0]
                log_likelihoods[number] += float((chosen - normalizers[rows]).double().sum())
                are_greedy[number] &= bool((likeliest[rows] == targets).all())
            first += len(logits)
        return {number: (log_likelihoods[number], are_greedy[number]) for number in continuations}

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        found = []
        for (text,) in [request.args for request in requests]:
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(
        self,
        context: str,
        options: dict[str, Any],  # untyped: a task's `generation_kwargs`
    ) -> str:
        """Return the greedy answer up to the first stop text."""
        room = room_for_context(self.max_length, options)
        wanted = normalize_gen_kwargs(options, MAX_ANSWER_TOKENS)
        if wanted["do_sample"]:
            raise StageError(
                "a task requests sampled answers",
                where="its `generation_kwargs`, do_sample",
                expected="greedy decoding, so that scores can be compared",
            )
        until = handle_stop_sequences(wanted["until"], eos=self.tokenizer.eos_token)

        def text(tokens: Sequence[int]) -> str:
            return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

        prompt = np.array(self.tok_encode(context)[-room:])
        tokens = self._greedy(
            prompt,
            wanted["max_gen_toks"],
            lambda tokens: any(stop in text(tokens) for stop in until if stop),
        )
        return postprocess_generated_text(text(tokens), stop=until, think_end_token=None)


def room_for_context(
    max_length: int,
    options: dict[str, Any],  # untyped: a task's `generation_kwargs`
) -> int:
    """Return the longest prompt that leaves room for the answer, tokens."""
    wanted = normalize_gen_kwargs(options, MAX_ANSWER_TOKENS)["max_gen_toks"]
    if wanted >= max_length:
        raise StageError(
            "the answers of a task leave no room for its prompts",
            where="its `generation_kwargs`, max_gen_toks",
            found=wanted,
            expected=f"less than the {max_length} tokens that the model serves",
        )
    return max_length - wanted


def is_truncated(lm: TemplateLM, arguments: Sequence[Any]) -> bool:
    """True if a request loses the beginning of its prompt, which is how the harness makes it fit.

    Args:
        arguments: (context, continuation), (context, options), or (text,), which is cut into
            windows instead.
    """
    if len(arguments) < 2:
        return False
    context, second = arguments[:2]
    if isinstance(second, dict):
        limit, texts = room_for_context(lm.max_length, second), context
    else:
        limit, texts = lm.max_length + 1, context + second
    # A token has at least one byte; BOS and the space in front add two.
    return len(texts.encode()) + 2 > limit and len(lm.tok_encode(texts)) > limit
