"""The files of a checkpoint folder: the model's shape in config.json, and its weight files.

No weight is read here. If config.json lacks `sliding_window`, the model has no window, whereas
transformers' `MistralConfig` assumes 4096.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape, RopeParameters, RopeStretch
from workflow_scripts.log import StageError
from workflow_scripts.models import tensors
from workflow_scripts.models.tensors import TAKE_16_BITS

if TYPE_CHECKING:
    from workflow_scripts.settings import RopeScalingSettings

# A config.json: each architecture has its own keys.
ConfigJson = Mapping[str, Any]  # untyped: transformers' JSON

MODEL_TYPES = ("mistral", "mixtral", "ministral")
# Keys of config.json; early versions of compressed-tensors wrote the second one.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def read_shape(checkpoint: Path, scaling: RopeScalingSettings | None = None) -> ModelShape:
    """Read the shape of a model from its config.json.

    Args:
        scaling: RoPE scaling to apply; `rope_parameters` and `context_tokens` are then the scaled
            ones, and `rope_scaling` says from which context.
    Raises:
        StageError: the model is of another family or already quantized, its config.json lacks a key
            that decides the shape, or the scaling cannot be applied.
    """
    config = files.read_json(checkpoint / "config.json")
    check_unquantized(config, checkpoint / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise StageError(
            "the checkpoint is not a model of the Mistral family",
            where=f"{checkpoint / 'config.json'}, model_type",
            found=config.get("model_type"),
            expected=" or ".join(MODEL_TYPES),
        )
    try:
        n_heads = config["num_attention_heads"]
        rope = own_rope(config)
        shape = ModelShape(
            architecture=config["architectures"][0],
            model_type=config["model_type"],
            n_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            n_heads=n_heads,
            n_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // n_heads,
            vocabulary_size=config["vocab_size"],
            context_tokens=config["max_position_embeddings"],
            sliding_window=config.get("sliding_window"),
            layer_windows=layer_windows(config),
            rope_theta=config.get("rope_theta", rope.get("rope_theta")),
            rope_parameters=rope,
            n_experts=config.get("num_local_experts"),
            n_experts_per_token=config.get("num_experts_per_tok"),
            ties_embeddings=config.get("tie_word_embeddings", False),
            dtype=config.get("dtype") or config.get("torch_dtype"),
        )
    except (KeyError, IndexError) as error:
        key = error.args[0] if isinstance(error, KeyError) else "architectures"
        raise StageError(
            "the checkpoint's config.json lacks a key that decides the model's shape",
            where=f"{checkpoint / 'config.json'}, {key}",
            to_fix="copy config.json from the model's repository",
        ) from error
    return shape if scaling is None else stretched(shape, scaling, checkpoint)


def check_unquantized(config: ConfigJson, path: Path) -> None:
    """Check that the weights are not already quantized: such weights cannot be merged.

    Args:
        config: content of a config.json.
        path: path of that file, for the message.
    Raises:
        StageError: they are quantized; the message names the method and an alternative.
    """
    key = next((key for key in QUANTIZATION_KEYS if config.get(key)), None)
    if key is None:
        return
    quantization = config[key]
    method = quantization.get("quant_method") or quantization.get("format") or "unnamed method"
    bits = [
        f"{key}: {quantization[key]}"
        for key in ("load_in_4bit", "load_in_8bit", "bits", "fmt", "format", "bnb_4bit_quant_type")
        if quantization.get(key)
    ]
    raise StageError(
        "the checkpoint is already quantized",
        where=f"{path}, {key}",
        found=", ".join([str(method), *bits]),
        expected="the model in 16 or 32 bits: Tramontane itself quantizes it for training"
        " (recipes.<name>.method: qlora)",
        to_fix=TAKE_16_BITS + twin(config),
    )


def twin(config: ConfigJson) -> str:
    """Return a hint at the unquantized model, if config.json names one."""
    name = config.get("_name_or_path")
    return f"; this one names {name} as its origin" if name and not Path(name).is_dir() else ""


def own_rope(config: ConfigJson) -> RopeParameters:
    """Return a config.json's own `rope_parameters` in the form of transformers 5.

    Older files have `rope_scaling` with a `type`, and a separate `rope_theta`. Without any of these
    keys the positions are not scaled, and the result is empty.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if rope and "rope_type" not in rope:
        rope["rope_type"] = rope.pop("type", "default")
    if rope and "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def stretched(shape: ModelShape, scaling: RopeScalingSettings, checkpoint: Path) -> ModelShape:
    """Return the shape with RoPE scaling applied.

    Args:
        shape: shape of the unchanged checkpoint.
    Source: arXiv:2306.15595 (linear), arXiv:2309.00071 (YaRN); keys as transformers 5.23 reads
        them (modeling_rope_utils.py).
    Raises:
        StageError: the checkpoint is already scaled, or its θ is not known.
    """
    where = f"{checkpoint / 'config.json'}, rope_parameters"
    own_type = shape.rope_parameters.get("rope_type", "default")
    if own_type != "default":
        raise StageError(
            "the checkpoint has a RoPE scaling of its own",
            where=where,
            found=own_type,
            expected="no scaling in the checkpoint, because models.<name>.rope_scaling sets one",
            to_fix="remove models.<name>.rope_scaling: the checkpoint's own scaling is used",
        )
    if shape.rope_theta is None:
        raise StageError(
            "the checkpoint does not state its RoPE base",
            where=where,
            expected="rope_theta",
        )
    original = scaling.original_context_tokens or shape.context_tokens
    rope = {
        "rope_type": scaling.type,
        "rope_theta": shape.rope_theta,
        "factor": scaling.factor,
    }
    if scaling.type == "yarn":
        rope["original_max_position_embeddings"] = original
    if scaling.type == "dynamic" and original != shape.context_tokens:
        raise StageError(
            "dynamic NTK scales only from the context that the checkpoint states",
            where="models.<name>.rope_scaling.original_context_tokens",
            found=original,
            expected=f"null, or {shape.context_tokens} ({checkpoint / 'config.json'})",
        )
    return shape.model_copy(
        update={
            "context_tokens": int(original * scaling.factor),
            "rope_parameters": rope,
            "rope_scaling": RopeStretch(
                type=scaling.type, factor=scaling.factor, original_context_tokens=original
            ),
        }
    )


def layer_windows(config: ConfigJson) -> tuple[int | None, ...]:
    """Return the window of each layer; None is full causal attention.

    Ministral's layers differ: `layer_types` says which layers have the window.

    Args:
        config: content of a config.json.
    """
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the model's safetensors shards in order.

    A repository may also contain `consolidated.safetensors`, the same weights in Mistral's own
    layout. The index, or the single `model.safetensors`, decides.

    Raises:
        StageError: a shard is missing.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(files.read_json(index).get("weight_map", {}).values()))
        shards = [checkpoint / name for name in names]
    else:
        shards = [checkpoint / "model.safetensors"]
    missing = [path for path in shards if not path.is_file()]
    if missing or not shards:
        raise StageError(
            "the checkpoint is incomplete",
            where=missing[0] if missing else index,
            found="no such file" if missing else "no shards",
            expected="model.safetensors, or every shard that model.safetensors.index.json names",
            to_fix=_other_weights(checkpoint),
        )
    return shards


def _other_weights(checkpoint: Path) -> str:
    """Return the remedy for missing weights, or weights in another format."""
    if list(checkpoint.glob("pytorch_model*.bin")):
        return (
            "pytorch_model.bin is a pickle, which can run code, and is not opened: load it with"
            " transformers and save_pretrained, or choose a revision with safetensors"
        )
    if list(checkpoint.glob("consolidated*")):
        return (
            "consolidated files have Mistral's own layout: fetch the repository's"
            " model-*.safetensors, or convert them with transformers'"
            " convert_mistral_weights_to_hf.py"
        )
    return "fetch the missing files"


def check_shards(checkpoint: Path) -> None:
    """Check that every shard is as long as its header says.

    Raises:
        StageError: a shard is missing, damaged, or not a safetensors file.
    """
    tensors.stored(weight_files(checkpoint))


def check_whole(checkpoint: Path, facts: ModelShape) -> None:
    """Check that the folder contains one complete model, as its config.json describes it.

    Args:
        facts: shape from `read_shape` of the folder.
    Raises:
        StageError: files are missing or damaged, or tensors are missing, extra, or of another
            shape or type.
    """
    shards = weight_files(checkpoint)
    single = checkpoint / "model.safetensors"
    if single.is_file() and single not in shards:
        raise StageError(
            "the folder contains two models",
            where=checkpoint,
            found=f"{single.name}, and model.safetensors.index.json with {len(shards)} others",
            expected="one of them: transformers uses the former, llama.cpp's converter the index",
            to_fix=f"move away {single.name}, or the index with its shards",
        )
    tensors.check_tensors(shards, facts, where=checkpoint)
