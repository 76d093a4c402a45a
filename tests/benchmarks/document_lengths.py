"""Lengths of chat-like documents, for the benchmarks of packing: two lognormals, by seed.

Most conversations are short; a few bring a pasted file or go on for a day. The long ones are what
makes rows of one length differ in cost. The mix was chosen so that rows of 32,768 tokens in random
order show the problem that balancing solves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SHORTEST, LONGEST = 16, 32_768
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)


class Lognormal(NamedTuple):
    """A part of the mix."""

    fraction: float
    """Of the documents."""
    median: float
    """Tokens."""
    sigma: float
    """Standard deviation of the logarithm."""


MIX = (Lognormal(0.98, 400.0, 0.9), Lognormal(0.02, 8_000.0, 1.2))


def chat_lengths(n_documents: int, *, seed: int) -> np.ndarray:
    """(documents,) int32 tokens of each, rounded and held between `SHORTEST` and `LONGEST`."""
    generator = np.random.default_rng(seed)
    kind = generator.choice(len(MIX), size=n_documents, p=[part.fraction for part in MIX])
    logarithms = generator.standard_normal(n_documents)
    logarithms *= np.array([part.sigma for part in MIX])[kind]
    logarithms += np.log([part.median for part in MIX])[kind]
    lengths = np.rint(np.exp(logarithms))
    return lengths.clip(SHORTEST, LONGEST).astype(np.int32)


def summary(lengths: np.ndarray) -> dict[str, Any]:
    """What was drawn."""
    quantiles = np.quantile(lengths, QUANTILES).tolist()
    return {
        "n_documents": len(lengths),
        "n_tokens": int(lengths.sum(dtype=np.int64)),
        "mean_tokens": float(lengths.mean()),
        "longest_tokens": int(lengths.max()),
        "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        "mix": [part._asdict() for part in MIX],
    }
