"""Compare an F16 GGUF with the folder it was converted from: every weight, bit for bit, and the
metadata that llama.cpp computes and tokenizes with.

This finds faults that a sample of text cannot show: the embedding of a word that the sample lacks,
an epsilon that changes little, a context that is too long. It holds one tensor in memory.

llama.cpp pairs neighbouring rows of a head in the rotary position embedding, transformers rows of
the two halves; so the rows of q_proj and k_proj have another order in a GGUF.
Source: llama.cpp, conversion/llama.py and gguf-py/gguf/constants.py (architecture `llama`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.merge import tensor_names
from workflow_scripts.models.checkpoint_files import ConfigJson, weight_files
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.quantize import gguf_names, llama_cpp_source

TO_FIX = "delete the file and convert again; if that does not help, please report it"
_HEAD_SIZES = (
    "llama.rope.dimension_count",
    "llama.attention.key_length",
    "llama.attention.value_length",
)
_SCALING = "llama.rope.scaling."


class Compared(NamedTuple):
    """Numbers of tensors, keys and vocabulary entries that were compared."""

    n_tensors: int
    n_metadata_keys: int
    n_vocabulary_entries: int
    """Pieces of a SentencePiece tokenizer; 0 for tekken."""


def check(gguf: Path, merged: Path, facts: ModelShape) -> Compared:
    """Compare an F16 GGUF with the merged model.

    Args:
        gguf: F16 GGUF from convert_gguf.
        merged: folder that it was converted from.
        facts: facts of the base: its window and context.
    Raises:
        StageError: the first difference.
    """
    reader = llama_cpp_source.gguf_package().GGUFReader(gguf)
    fields = {key: field.contents for key, field in reader.fields.items()}
    config = files.read_json(merged / "config.json")
    wanted = expected_metadata(config, facts, chat_template=_chat_template(merged))
    # The converter leaves them out if a head has hidden size ÷ heads.
    if wanted[_HEAD_SIZES[0]] * config["num_attention_heads"] == config["hidden_size"]:
        wanted = {k: v for k, v in wanted.items() if k not in _HEAD_SIZES or k in fields}
    for key, value in wanted.items():
        _compare(gguf, key, fields[key]() if key in fields else None, value)
    is_stretched = f"{_SCALING}type" in wanted
    for key in sorted(fields.keys() - wanted.keys()):
        # Any other key of the architecture may change the computation.
        if key.startswith("llama.") and not (is_stretched and key.startswith(_SCALING)):
            _compare(gguf, key, fields[key](), None)
    n_tokens = _check_pieces(gguf, merged, fields)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    n_tensors = _check_tensors(gguf, merged, tensors, config)
    return Compared(n_tensors, len(wanted), n_tokens)


def expected_metadata(
    config: ConfigJson, facts: ModelShape, *, chat_template: str
) -> dict[str, Any]:  # untyped: llama.cpp's metadata
    """Return the keys and values that the file must have.

    Args:
        config: config.json of the merged model.
        facts: as in `check`.
    """
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
    n_heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // n_heads
    wanted = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": facts.served_context_tokens,
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": config.get("num_key_value_heads", n_heads),
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **dict.fromkeys(_HEAD_SIZES, head_size),
        "llama.rope.freq_base": rope["rope_theta"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": chat_template,
    }
    kind = rope.get("rope_type", "default")
    if kind != "default":
        wanted |= {f"{_SCALING}type": kind, f"{_SCALING}factor": rope["factor"]}
        if "original_max_position_embeddings" in rope and kind == "yarn":
            original = rope["original_max_position_embeddings"]
            wanted[f"{_SCALING}original_context_length"] = original
    if config.get("num_local_experts"):
        wanted |= {
            "llama.expert_count": config["num_local_experts"],
            "llama.expert_used_count": config["num_experts_per_tok"],
        }
    return wanted


def _chat_template(merged: Path) -> str:
    return (merged / "chat_template.jinja").read_text(encoding="utf-8")


def _compare(gguf: Path, key: str, found: Any, expected: Any) -> None:
    if isinstance(expected, float) and found is not None:  # the file's numbers are float32
        is_same = np.float32(found) == np.float32(expected)
    else:
        is_same = found == expected
    if is_same:
        return
    if isinstance(expected, str) and isinstance(found, str) and len(expected) > 80:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        key, found, expected = f"{key}, character {at}", found[at:][:40], expected[at:][:40]
    raise StageError(
        "the GGUF's metadata differs from the merged model's",
        where=f"{gguf}, {key}",
        found=repr(found),
        expected=repr(expected),
        to_fix=TO_FIX,
    )


def _check_pieces(gguf: Path, merged: Path, fields: Mapping[str, Callable[[], Any]]) -> int:
    """Compare every piece of a SentencePiece tokenizer and its score; returns the number compared.

    Tekken's merges are checked only by the sample of conversations.
    """
    original = find_tokenizer(merged)
    if original.suffix == ".json":
        return 0
    pieces = SentencePieceProcessor(model_file=str(original))
    n_pieces = pieces.get_piece_size()
    texts, scores = (fields[f"tokenizer.ggml.{name}"]() for name in ("tokens", "scores"))
    for at in range(n_pieces):
        if pieces.is_control(at) or pieces.is_unknown(at):
            continue  # their scores mean nothing
        found = (texts[at], round(scores[at], 3)) if at < len(texts) else None
        expected = (pieces.id_to_piece(at), round(pieces.get_score(at), 3))
        if found != expected:
            raise StageError(
                "the GGUF's tokenizer differs from the merged model's",
                where=f"{gguf}, token {at}",
                found=found,
                expected=f"{expected}, the piece and its score in {original.name}",
                to_fix="keep the base's tokenizer.model in the merged folder, and convert again",
            )
    return n_pieces


def _check_tensors(
    gguf: Path, merged: Path, tensors: Mapping[str, np.ndarray], config: ConfigJson
) -> int:
    seen: set[str] = set()
    for name, index, values in expected_tensors(merged, config):
        if name not in tensors:
            if name == "output.weight" and config.get("tie_word_embeddings"):
                continue  # llama.cpp uses the embeddings
            raise StageError(
                "the GGUF lacks a tensor of the merged model",
                where=gguf,
                found=f"no {name}",
                expected=", ".join(sorted(tensors)[:3]) + " … and this one",
                to_fix=TO_FIX,
            )
        seen.add(name)
        found = tensors[name][index]
        if found.shape != values.shape:
            raise StageError(
                "a tensor of the GGUF has another shape than in the merged model",
                where=f"{gguf}, {name}",
                found=found.shape,
                expected=values.shape,
                to_fix=TO_FIX,
            )
        is_other = _bits(found) != _bits(values)
        if not is_other.any():
            continue
        at = tuple(np.argwhere(is_other)[0].tolist())
        raise StageError(
            "a tensor of the GGUF differs from the merged model's",
            where=f"{gguf}, {name}, element {list(at)}",
            found=f"{found[at]}; {int(is_other.sum())} of {is_other.size} elements differ",
            expected=f"{values[at]}, the merged model's value in {values.dtype}",
            to_fix=TO_FIX,
        )
    extra = sorted(set(tensors) - seen)
    if extra:
        raise StageError(
            "the GGUF has tensors that the merged model lacks",
            where=gguf,
            found=", ".join(extra[:3]),
            to_fix=TO_FIX,
        )
    return len(seen)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view("u2" if values.dtype.itemsize == 2 else "u4")


def expected_tensors(merged: Path, config: ConfigJson) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Yield each tensor of the merged model as the GGUF must hold it: its name there, the index in
    the tensor of that name (experts share one), and the values.

    Raises:
        StageError: a weight is too large for float16.
    """
    for path in weight_files(merged):
        with safe_open(path, framework="pt") as shard:
            for source in shard.keys():
                values = shard.get_tensor(source).float().numpy()
                for name, index, part in _placed(source, values, config):
                    if part.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
                        yield name, index, np.ascontiguousarray(part)
                        continue
                    halved = torch.from_numpy(np.ascontiguousarray(part)).half().numpy()
                    n_lost = int(np.count_nonzero(~np.isfinite(halved)))
                    if n_lost:
                        raise StageError(
                            "weights of the merged model do not fit into float16",
                            where=f"{path}, {source}",
                            found=f"{n_lost} weights, the largest {np.abs(part).max():.4g}",
                            expected="finite numbers up to 65504",
                            to_fix="train with a lower learning rate: a trained Mistral's weights"
                            " are below 100",
                        )
                    yield name, index, halved


def _placed(
    source: str, values: np.ndarray, config: ConfigJson
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Yield the same for one tensor of the checkpoint, in float32."""
    part = tensor_names.part(source)
    names = gguf_names.names(part.parameter)
    if ".experts." in part.parameter:
        if part.expert is None:  # the file fuses all experts in one tensor
            for name, half in zip(names, np.split(values, len(names), axis=1), strict=True):
                yield name, ..., half
        else:
            yield names[part.half or 0], part.expert, values
        return
    if ".q_proj." in part.parameter or ".k_proj." in part.parameter:
        n_heads = config["num_attention_heads"]
        if ".k_proj." in part.parameter:
            n_heads = config.get("num_key_value_heads", n_heads)
        values = neighbouring_pairs(values, n_heads)
    yield names[0], ..., values


def neighbouring_pairs(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of each head from halves to pairs: first, second, first, second …"""
    size = values.shape[0] // n_heads
    within = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    rows = (np.arange(n_heads)[:, None] * size + within).reshape(-1)
    return values[rows]
