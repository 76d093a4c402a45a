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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from workflow_scripts.log import SECONDS_BETWEEN_LINES
from workflow_scripts.models import stdlib_docs

if TYPE_CHECKING:
    from transformers import MistralForCausalLM

BOS, EOS, BEGIN_INST, END_INST = 1, 2, 3, 4  # the v3 tokenizer's control tokens
ROW_TOKENS = 1024  # twice the window: every distance within it is met, and none beyond
LOSS_CHUNK_TOKENS = 256  # positions whose logits exist at once: 256 × 32768 floats, 32 MiB
PASSAGE_WEIGHTS = {"documentation": 0.5, "source": 0.1, "continuation": 0.3, "recall": 0.1}
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

    Matrix products run in bfloat16 (autocast), weights and their updates in float32. Hidden
    matrices take Muon, the rest AdamW: on rows of 512 tokens the loss was 5.54 nats a token after
    200 steps, where AdamW for all had 5.79 after 300. Muon: https://kellerjordan.github.io/posts/muon,
    in PyTorch since 2.9.

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
    from torch.nn import functional

    device = model.device
    embeddings = [model.model.embed_tokens.weight]
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in embeddings + matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": embeddings, "lr": 0.3 * learning_rate},
                {"params": others, "lr": 0.15 * learning_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=True,
        ),
    ]
    n_warmup = max(1, n_steps // 20)

    def share_of_peak(step: int) -> float:
        return min((step + 1) / n_warmup, max(0.02, 1 - step / n_steps))

    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak) for optimizer in optimizers
    ]
    stream = rows(passages(encode, seed=seed))
    losses: list[float] = []
    started = reported = time.monotonic()
    for step in range(n_steps):
        token_ids = torch.tensor([next(stream)], device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.model(token_ids, use_cache=False).last_hidden_state[:, :-1]
        targets = token_ids[:, 1:].flatten()
        # The logits are most of the work and of the memory: made and spent a chunk at a time,
        # against one bfloat16 copy of the output layer (autocast would copy it for every chunk).
        leaf = hidden.detach().flatten(0, 1).bfloat16().requires_grad_()
        head = model.lm_head.weight.detach().bfloat16().requires_grad_()
        total = 0.0
        for chunk, chunk_targets in zip(
            leaf.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS), strict=True
        ):
            loss = functional.cross_entropy(chunk @ head.T, chunk_targets, reduction="sum")
            (loss / len(targets)).backward()
            total += loss.item()
        hidden.backward(leaf.grad.view_as(hidden).to(hidden.dtype))
        model.lm_head.weight.grad = head.grad.float()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        losses.append(total / len(targets))
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
    return losses
