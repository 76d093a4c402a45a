"""Contents of an F16 GGUF against the folder it was converted from: every weight, bit for bit, and
the metadata that llama.cpp computes and tokenizes by.

What a sample of text cannot show is found here: the embedding of a word that the sample lacks, an
epsilon that changes little, a context that is too long. Memory is one tensor.

llama.cpp turns the pairs of the rotary position embedding from halves of a head to neighbours, so
the rows of q_proj and k_proj are in another order there.
Source: llama.cpp, conversion/llama.py and gguf-py/gguf/constants.py (architecture `llama`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.merge import tensor_names
from workflow_scripts.models.checkpoint_files import ConfigJson, weight_files
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.quantize import llama_cpp_source

if TYPE_CHECKING:
    import numpy as np

TO_FIX = "delete the file and convert again; if it stays, please report it"
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_HEAD_SIZES = (
    "llama.rope.dimension_count",
    "llama.attention.key_length",
    "llama.attention.value_length",
)
_SCALING = "llama.rope.scaling."
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(?:\.weight)?")


class Compared(NamedTuple):
    """How much of a GGUF was compared with the merged model."""

    n_tensors: int
    n_metadata_keys: int
    n_vocabulary_entries: int
    """Pieces of a SentencePiece tokenizer; 0 for tekken."""


def check(gguf: Path, merged: Path, facts: ModelShape) -> Compared:
    """
    Args:
        gguf: F16 GGUF of convert_gguf.
        merged: the folder it was converted from.
        facts: of the base: its window and context.
    Raises:
        StageError: the first difference.
    """
    reader = llama_cpp_source.gguf_package().GGUFReader(gguf)
    fields = {key: field.contents for key, field in reader.fields.items()}
    config = files.read_json(merged / "config.json")
    wanted = expected_metadata(config, facts, chat_template=_chat_template(merged))
    # Left out where a head is the hidden size over the heads.
    if wanted[_HEAD_SIZES[0]] * config["num_attention_heads"] == config["hidden_size"]:
        wanted = {k: v for k, v in wanted.items() if k not in _HEAD_SIZES or k in fields}
    for key, value in wanted.items():
        _compare(gguf, key, fields[key]() if key in fields else None, value)
    is_stretched = f"{_SCALING}type" in wanted
    for key in sorted(fields.keys() - wanted.keys()):
        # Any other key of the architecture may change what is computed.
        if key.startswith("llama.") and not (is_stretched and key.startswith(_SCALING)):
            _compare(gguf, key, fields[key](), None)
    n_tokens = _check_pieces(gguf, merged, fields)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    n_tensors = _check_tensors(gguf, merged, tensors, config)
    return Compared(n_tensors, len(wanted), n_tokens)


def expected_metadata(
    config: ConfigJson, facts: ModelShape, *, chat_template: str
) -> dict[str, Any]:  # untyped: metadata of llama.cpp's
    """Keys and values that the file must have.

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
    import numpy as np

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
        "the GGUF's metadata is not the merged model's",
        where=f"{gguf}, {key}",
        found=repr(found),
        expected=repr(expected),
        to_fix=TO_FIX,
    )


def _check_pieces(gguf: Path, merged: Path, fields: Mapping[str, Callable[[], Any]]) -> int:
    """Every piece of a SentencePiece tokenizer with its score. Tekken's merges are judged by the
    sample of conversations alone.

    Returns:
        How many were compared.
    """
    original = find_tokenizer(merged)
    if original.suffix == ".json":
        return 0
    from sentencepiece import SentencePieceProcessor

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
                "the GGUF's tokenizer is not the merged model's",
                where=f"{gguf}, token {at}",
                found=found,
                expected=f"{expected}, the piece and its score in {original.name}",
                to_fix="keep the base's tokenizer.model in the merged folder, and convert again",
            )
    return n_pieces


def _check_tensors(
    gguf: Path, merged: Path, tensors: Mapping[str, np.ndarray], config: ConfigJson
) -> int:
    import numpy as np

    seen: set[str] = set()
    for name, index, values in expected_tensors(merged, config):
        if name not in tensors:
            if name == "output.weight" and config.get("tie_word_embeddings"):
                continue  # llama.cpp takes the embeddings
            raise StageError(
                "the GGUF lacks a tensor of the merged model",
                where=gguf,
                found=f"no {name}",
                expected=", ".join(sorted(tensors)[:3]) + " … and it",
                to_fix=TO_FIX,
            )
        seen.add(name)
        found = tensors[name][index]
        is_other = (
            np.full(1, True) if found.shape != values.shape else _bits(found) != _bits(values)
        )
        if not is_other.any():
            continue
        where = f"{gguf}, {name}"
        if found.shape != values.shape:
            raise StageError(
                "a tensor of the GGUF has another shape than in the merged model",
                where=where,
                found=found.shape,
                expected=values.shape,
                to_fix=TO_FIX,
            )
        at = tuple(np.argwhere(is_other)[0].tolist())
        raise StageError(
            "a tensor of the GGUF is not the merged model's",
            where=f"{where}, element {list(at)}",
            found=f"{found[at]}; {int(is_other.sum())} of {is_other.size} elements differ",
            expected=f"{values[at]}, the merged model's value in {values.dtype}",
            to_fix=TO_FIX,
        )
    extra = sorted(set(tensors) - seen)
    if extra:
        raise StageError(
            "the GGUF has tensors that the merged model has not",
            where=gguf,
            found=", ".join(extra[:3]),
            to_fix=TO_FIX,
        )
    return len(seen)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view("u2" if values.dtype.itemsize == 2 else "u4")


def expected_tensors(merged: Path, config: ConfigJson) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Each tensor of the merged model as the GGUF must hold it: its name there, the index in the
    tensor of that name (experts share one), and the values.

    Raises:
        StageError: a weight is too large for float16.
    """
    import numpy as np
    import torch
    from safetensors import safe_open

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
    """As `expected_tensors`, of one tensor in float32."""
    part = tensor_names.part(source)
    if part.parameter in _TOP:
        yield _TOP[part.parameter], ..., values
        return
    match = _LAYER.fullmatch(part.parameter)
    if match is None:
        raise StageError("a tensor of the merged model has no place in a GGUF", where=source)
    layer, module = match.groups()
    if ".experts." in module:
        kind = module.rpartition(".")[2]
        names = ("ffn_gate_exps", "ffn_up_exps") if kind == "gate_up_proj" else ("ffn_down_exps",)
        if part.expert is None:  # fused in the file: all experts in one tensor
            n_rows = values.shape[1] // len(names)
            for at, name in enumerate(names):
                rows = slice(at * n_rows, (at + 1) * n_rows)
                yield f"blk.{layer}.{name}.weight", ..., values[:, rows]
        else:
            yield f"blk.{layer}.{names[part.half or 0]}.weight", part.expert, values
        return
    if module not in _IN_LAYER:
        raise StageError("a tensor of the merged model has no place in a GGUF", where=source)
    if module.endswith(("q_proj", "k_proj")):
        n_heads = config["num_attention_heads"]
        if module.endswith("k_proj"):
            n_heads = config.get("num_key_value_heads", n_heads)
        values = neighbouring_pairs(values, n_heads)
    yield f"blk.{layer}.{_IN_LAYER[module]}.weight", ..., values


def neighbouring_pairs(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a head from (first half, second half) to (first, second, first, second …)."""
    import numpy as np

    size = values.shape[0] // n_heads
    within = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    rows = (np.arange(n_heads)[:, None] * size + within).reshape(-1)
    return values[rows]
