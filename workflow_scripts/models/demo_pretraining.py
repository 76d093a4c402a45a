"""Pre-training of the demo model: a few minutes of plain text on a CPU, so that fine-tuning has a
base.

The text is the standard library's own documentation and sources, read from the running
interpreter, with two kinds of passages in the chat template's control tokens mixed in: a text cut
in two (so that meeting `[INST]` is not what fine-tuning gains) and facts to recall (so that the
model must look back).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from workflow_scripts.log import SECONDS_BETWEEN_LINES
from workflow_scripts.models import stdlib_docs

if TYPE_CHECKING:
    import torch
    from transformers import MistralForCausalLM

BOS, EOS, BEGIN_INST, END_INST = 1, 2, 3, 4  # the v3 tokenizer's control tokens
ROW_TOKENS = 1024  # twice the window: every distance within it is met, and none beyond
PASSAGE_WEIGHTS = {"documentation": 0.5, "source": 0.1, "continuation": 0.3, "recall": 0.1}
WEIGHT_DECAY = 0.01
MOMENTUM = 0.95  # Muon's, as are the coefficients
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
CITIES = (
    "Lisbon Oslo Cairo Lima Quito Accra Hanoi Perth Turin Izmir Kyoto Malmo Basel Porto".split()
)

Encode = Callable[[str], list[int]]


def passages(encode: Encode, *, seed: int) -> Iterator[list[int]]:
    """Endless documents as token ids, each from BOS to EOS, drawn by `PASSAGE_WEIGHTS`.

    Args:
        encode: text to token ids, without BOS or EOS.
        seed: decides the order of everything.
    """
    generator = random.Random(seed)
    documentation = [
        f"{entry.call or entry.name}\n\n{entry.docstring}" for entry in stdlib_docs.entries()
    ]
    sources = [
        text[start : start + 3000]
        for text in stdlib_docs.module_sources()
        for start in range(0, len(text), 3000)
    ]
    decks: dict[str, list[str]] = {"documentation": [], "source": []}
    texts = {"documentation": documentation, "source": sources}

    def draw(kind: str) -> str:
        if not decks[kind]:
            decks[kind] = generator.sample(texts[kind], len(texts[kind]))
        return decks[kind].pop()

    kinds, weights = zip(*PASSAGE_WEIGHTS.items(), strict=True)
    while True:
        (kind,) = generator.choices(kinds, weights)
        if kind == "continuation":
            words = draw("documentation").split(" ")
            cut = generator.randrange(len(words) // 2 + 1)
            prompt, answer = " ".join(words[:cut]), " ".join(words[cut:])
            yield [BOS, BEGIN_INST, *encode(prompt), END_INST, *encode(answer), EOS]
        elif kind == "recall":
            cities = generator.sample(CITIES, generator.randint(2, 6))
            codes = {city: str(generator.randrange(1000, 10000)) for city in cities}
            facts = " ".join(f"The code of {city} is {code}." for city, code in codes.items())
            asked = generator.choice(cities)
            prompt, answer = f"{facts} What is the code of {asked}?", codes[asked]
            yield [BOS, BEGIN_INST, *encode(prompt), END_INST, *encode(answer), EOS]
        else:
            yield [BOS, *encode(draw(kind)), EOS]


def rows(documents: Iterator[list[int]]) -> Iterator[list[int]]:
    """The documents end to end, cut into rows of `ROW_TOKENS`."""
    pending: list[int] = []
    for document in documents:
        pending.extend(document)
        while len(pending) >= ROW_TOKENS:
            yield pending[:ROW_TOKENS]
            pending = pending[ROW_TOKENS:]


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32.

    A CPU without AVX512-BF16 or AMX takes nine times as long in bfloat16 (1,024 × 256 by
    256 × 1,024 on an AVX2 core: 71 ms, in float32 8 ms).
    """
    import torch

    if device.type == "cpu":
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        is_fast = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32


def muon_step(
    weights: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    *,
    learning_rate: float,
    dtype: torch.dtype,
) -> None:
    """One step of Muon on matrices, in place, their gradients given; as `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, which multiplies in bfloat16 whatever the hardware.

    Args:
        momenta: a matrix a weight, zero before the first step.
        dtype: of the matrix products.
    Source: https://kellerjordan.github.io/posts/muon.
    """
    import torch

    with torch.no_grad():
        for weight, momentum in zip(weights, momenta, strict=True):
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonalized(weight.grad.lerp(momentum, MOMENTUM), dtype)
            weight.mul_(1 - learning_rate * WEIGHT_DECAY)
            # As large an update as AdamW's usually is: 0.2 in the root mean square.
            scale = 0.2 * max(weight.shape) ** 0.5
            weight.add_(update, alpha=-learning_rate * scale)


def orthogonalized(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About the nearest matrix with singular values of one, by five Newton–Schulz steps."""
    import torch

    is_tall = matrix.shape[0] > matrix.shape[1]
    result = (matrix.T if is_tall else matrix).to(dtype)
    result = result / result.norm().clamp(min=1e-7)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(5):
        gram = result @ result.T
        update = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        result = torch.addmm(result, update, result, beta=linear)
    return result.T if is_tall else result


class OccurringWords:
    """Embeddings and output layer of the words that a text has; the others share one row.

    A word that is never a target is pushed away from every position nearly alike. So here the rows
    of all of them move by one vector, which counts in the softmax as often as there are such words
    (where they began is left out: the model that comes out is a little another): of 32,768
    words 280 rows of the demo's text have 8,398, and half of a step's products go. Their
    input embeddings no text ever moves.

    Args:
        model: float32; `write_back` changes it.
        texts: token ids of all that will be trained on.
    """

    def __init__(self, model: MistralForCausalLM, texts: torch.Tensor) -> None:
        import torch

        self._model = model
        self.ids = texts.unique()
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        self.embeddings = torch.nn.Parameter(embeddings.detach()[self.ids])
        moved = torch.zeros_like(head[:1])  # of the other words, from where they began
        self.head = torch.nn.Parameter(torch.cat([head.detach()[self.ids], moved]))
        self._is_other = torch.ones(len(head), dtype=torch.bool, device=head.device)
        self._is_other[self.ids] = False
        # exp(log n + x) is n words with the logit x; with none of them there is no such logit.
        self._log_n_others = torch.log(self._is_other.sum().float())

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(…, hidden) input embeddings."""
        return self.embeddings[self.numbers(token_ids)]

    def numbers(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of `embeddings` and `head`."""
        import torch

        return torch.searchsorted(self.ids, token_ids)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Mean cross-entropy over the whole vocabulary, nats per token.

        Args:
            hidden: (n_tokens, hidden).
            targets: (n_tokens,) token ids.
            dtype: of the matrix product.
        """
        from torch.nn import functional

        logits = (hidden.to(dtype) @ self.head.to(dtype).T).float()
        weighted = functional.pad(self._log_n_others[None], (len(self.ids), 0))
        return functional.cross_entropy(logits + weighted, self.numbers(targets))

    def write_back(self) -> None:
        """Put what was learned into the model."""
        import torch

        with torch.no_grad():
            self._model.model.embed_tokens.weight[self.ids] = self.embeddings
            self._model.lm_head.weight[self.ids] = self.head[:-1]
            self._model.lm_head.weight[self._is_other] += self.head[-1]


def pretrain(
    model: MistralForCausalLM,
    encode: Encode,
    *,
    n_steps: int,
    learning_rate: float,
    seed: int,
    logger: logging.Logger,
) -> list[float]:
    """Train all weights on `n_steps` rows of `ROW_TOKENS` tokens; changes `model` in place.

    Matrix products run in `product_dtype`, weights and their updates in float32. Hidden
    matrices take Muon, the rest AdamW: on rows of 512 tokens the loss was 5.54 nats a token after
    200 steps, where AdamW for all had 5.79 after 300.

    Args:
        model: on its device, float32.
        encode: text to token ids, without BOS or EOS.
        n_steps: optimizer steps.
        learning_rate: Muon's peak; the embeddings' is 0.3 of it, the other weights' 0.15.
        seed: order of the text.
        logger: told the loss at most every 30 s.
    Returns:
        Mean loss of each step, nats per token.
    """
    import torch

    device = model.device
    dtype = product_dtype(device)
    stream = rows(passages(encode, seed=seed))
    texts = torch.tensor(list(islice(stream, n_steps)), device=device)
    words = OccurringWords(model, texts)
    embeddings = [words.embeddings]
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.model.parameters() if weight.ndim == 1]
    learned = [*embeddings, words.head, *matrices, *norms]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    adamw = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": 0.3 * learning_rate},
            {"params": [words.head, *norms], "lr": 0.15 * learning_rate},
        ],
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    n_warmup = max(1, n_steps // 20)

    def share_of_peak(step: int) -> float:
        return min((step + 1) / n_warmup, max(0.02, 1 - step / n_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, share_of_peak)
    losses: list[float] = []
    started = reported = time.monotonic()
    for step, token_ids in enumerate(texts):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden = model.model(
                inputs_embeds=words.embed(token_ids[None]), use_cache=False
            ).last_hidden_state
        loss = words.loss(hidden[0, :-1], token_ids[1:], dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        muon_step(matrices, momenta, learning_rate=learning_rate * share_of_peak(step), dtype=dtype)
        adamw.step()
        schedule.step()
        for weight in learned:
            weight.grad = None
        losses.append(loss.item())
        now = time.monotonic()
        if now - reported > SECONDS_BETWEEN_LINES or step == n_steps - 1:
            logger.info(
                "trained step=%d of=%d loss_nats_per_token=%.3f tokens_per_second=%.0f",
                step + 1,
                n_steps,
                losses[-1],
                (step + 1) * token_ids.numel() / (now - started),
            )
            reported = now
    words.write_back()
    return losses
