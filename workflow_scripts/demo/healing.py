"""Healing: a short training of a transplanted model, on documentation that no chat asks about.

Two things are new to the model. Mistral's tokenizer splits white space and punctuation differently
from its own. And a sliding window hides the first token, to which attention heads give their weight
when nothing else matters; therefore rows are longer than the training window.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch.nn import functional
from transformers import MistralForCausalLM

from workflow_scripts.demo import stdlib_docs
from workflow_scripts.log import SECONDS_BETWEEN_LINES

BOS = 1  # v3 tokenizer
ROW_TOKENS = 512
WINDOW = 256  # half of the row does not see its first token
WARMUP_STEPS = 3
MAX_GRADIENT_NORM = 1.0
# Share of the change of each weight that the demo's base model keeps. Training on eight thousand
# tokens of documentation also makes the model forget a little. The weights in between predict text
# better than those before and those after, and recall more than those after (the idea is from
# arXiv:2109.01903, the figures are from tests/benchmarks/demo_model.py).
SHARE_OF_CHANGE = 2 / 3

Encode = Callable[[str], list[int]]


def read_rows(encode: Encode, *, n_rows: int, seed: int) -> torch.Tensor:
    """Return documentation as rows of `ROW_TOKENS` tokens, each beginning with BOS.

    Args:
        encode: converts a text to token ids, without BOS or EOS.
        seed: decides the order of the texts.
    Returns:
        (n_rows, ROW_TOKENS) token ids; fewer rows if the library has less text.
    """
    texts = stdlib_docs.unlisted_docstrings()
    random.Random(seed).shuffle(texts)
    return torch.tensor(list(islice(_rows(map(encode, texts), encode("\n\n")), n_rows)))


def _rows(documents: Iterable[list[int]], separator: list[int]) -> Iterable[list[int]]:
    row = [BOS]
    for document in documents:
        row += document + separator
        while len(row) >= ROW_TOKENS:
            yield row[:ROW_TOKENS]
            row = [BOS, *row[ROW_TOKENS:]]


def product_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the hardware multiplies in it, otherwise float32.

    A CPU without AVX512-BF16 or AMX takes nine times as long in bfloat16 (1,024 × 256 by
    256 × 1,024 on an AVX2 core: 71 ms, in float32 8 ms). `ATEN_CPU_CAPABILITY` may forbid torch to
    use what the hardware has.
    """
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        is_fast = has_bf16 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    else:
        is_fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_fast else torch.float32


def heal(
    model: MistralForCausalLM,
    rows: torch.Tensor,
    *,
    learning_rate: float,
    share_of_change: float,
    logger: logging.Logger,
) -> list[float]:
    """Train all weights of `model` in place, one row per step, and keep a share of the change.

    Matrix products are in `product_dtype`, weights and updates in float32.

    Args:
        model: on its device, float32.
        rows: (rows, ROW_TOKENS) token ids.
        learning_rate: AdamW's peak; it rises over `WARMUP_STEPS`, then falls to zero.
        share_of_change: 1 keeps the trained weights, 0 the original ones.
        logger: logs the loss, at most every 30 s.
    Returns:
        Mean loss of each step, nats per token.
    """
    dtype = product_dtype(model.device)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    adamw = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def share_of_peak(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 1 - step / len(rows))

    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, share_of_peak)
    window, model.config.sliding_window = model.config.sliding_window, WINDOW
    losses: list[float] = []
    started = reported = time.monotonic()
    for step, token_ids in enumerate(rows.to(model.device)):
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=token_ids[None], use_cache=False).logits[0, :-1]
        loss = functional.cross_entropy(logits.float(), token_ids[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        adamw.step()
        schedule.step()
        adamw.zero_grad(set_to_none=True)
        losses.append(loss.item())
        now = time.monotonic()
        if now - reported > SECONDS_BETWEEN_LINES or step == len(rows) - 1:
            logger.info(
                "trained step=%d of=%d loss_nats_per_token=%.3f tokens_per_second=%.0f",
                step + 1,
                len(rows),
                losses[-1],
                (step + 1) * token_ids.numel() / (now - started),
            )
            reported = now
    model.config.sliding_window = window
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), before, strict=True):
            parameter.copy_(torch.lerp(start, parameter, share_of_change))
    return losses
