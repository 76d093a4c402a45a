"""A checkpoint folder on disk: its facts, and loading it as a model.

Facts come from the files themselves. One trap: where config.json lacks `sliding_window`, the class
`MistralConfig` fills in 4096 by itself; here a missing key means no window, and loading says so
explicitly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape, RopeParameters, RopeStretch
from workflow_scripts.log import DOCTOR, StageError
from workflow_scripts.models import exhaustion, tensors
from workflow_scripts.models.tensors import TAKE_16_BITS

if TYPE_CHECKING:
    from torch import device, dtype
    from transformers import PreTrainedConfig, PreTrainedModel

    from workflow_scripts.settings import RopeScalingSettings

# A config.json: each architecture has keys of its own.
ConfigJson = Mapping[str, Any]  # untyped: transformers' JSON

Precision = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
# `CUDA_VISIBLE_DEVICES` of a job without a GPU; the last is Slurm's.
NO_GPUS = ("", "-1", "NoDevFiles")
# There where NVIDIA's driver is: Linux, and Windows' subsystem for it.
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
MODEL_TYPES = ("mistral", "mixtral", "ministral")
# Of config.json; the second is what compressed-tensors wrote at first.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def read_shape(checkpoint: Path, scaling: RopeScalingSettings | None = None) -> ModelShape:
    """The shape of a model, from its config.json; no weight is read.

    Args:
        scaling: stretches the model's positions; `rope_parameters` and `context_tokens` are then
            the stretched ones, and `rope_scaling` says from what.
    Raises:
        StageError: not a Mistral or Mixtral, already quantized, or a key that decides the shape is
            missing; or its positions cannot be stretched so.
    """
    config = files.read_json(checkpoint / "config.json")
    check_unquantized(config, checkpoint / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise StageError(
            "the checkpoint is not of the Mistral family",
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
            "the checkpoint's config lacks a key that decides the model's shape",
            where=f"{checkpoint / 'config.json'}, {key}",
            to_fix="take config.json from the model's repository",
        ) from error
    return shape if scaling is None else stretched(shape, scaling, checkpoint)


def check_unquantized(config: ConfigJson, path: Path) -> None:
    """The weights are not already quantized: they could be neither merged nor quantized again.

    Args:
        config: content of a config.json.
        path: of that file, for the message.
    Raises:
        StageError: naming the method, and what to take instead.
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
        expected="the model in 16 or 32 bits: Tramontane quantizes it for training by itself"
        " (recipes.<name>.method: qlora)",
        to_fix=TAKE_16_BITS + twin(config),
    )


def twin(config: ConfigJson) -> str:
    """Where the unquantized model may be, as far as a config.json tells."""
    name = config.get("_name_or_path")
    return f"; this one names {name} as its origin" if name and not Path(name).is_dir() else ""


def own_rope(config: ConfigJson) -> RopeParameters:
    """A config.json's own `rope_parameters`, in the form of transformers 5.

    Older files have `rope_scaling` with a `type`, and `rope_theta` beside it; with neither, the
    positions are plain and nothing need be said.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if rope and "rope_type" not in rope:
        rope["rope_type"] = rope.pop("type", "default")
    if rope and "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def stretched(shape: ModelShape, scaling: RopeScalingSettings, checkpoint: Path) -> ModelShape:
    """The shape with its positions stretched.

    Args:
        shape: of the checkpoint as it is.
    Source: arXiv:2306.15595 (linear), arXiv:2309.00071 (YaRN); keys as transformers 5.23 reads
        them (modeling_rope_utils.py).
    Raises:
        StageError: the checkpoint's positions are stretched already, or its θ is not known.
    """
    where = f"{checkpoint / 'config.json'}, rope_parameters"
    own_type = shape.rope_parameters.get("rope_type", "default")
    if own_type != "default":
        raise StageError(
            "the checkpoint has a RoPE scaling of its own",
            where=where,
            found=own_type,
            expected="none beside models.<name>.rope_scaling",
            to_fix="leave models.<name>.rope_scaling out: the checkpoint's own is used",
        )
    if shape.rope_theta is None:
        raise StageError(
            "the checkpoint does not say its RoPE base", where=where, expected="rope_theta"
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
            "dynamic NTK stretches from the context that the checkpoint names, and no other",
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
    """The window of each layer; None is full causal attention.

    Ministral's layers differ: `layer_types` says which of them have the window.

    Args:
        config: content of a config.json.
    """
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors shards that make up the model, in order.

    A repository may also hold `consolidated.safetensors`, the same weights in Mistral's own
    layout; the index (or the single `model.safetensors`) says what counts.
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
            "the checkpoint is not whole",
            where=missing[0] if missing else index,
            found="no such file" if missing else "no shard",
            expected="model.safetensors, or every shard that model.safetensors.index.json names",
            to_fix=_other_weights(checkpoint),
        )
    return shards


def _other_weights(checkpoint: Path) -> str:
    """The remedy where a folder holds its weights in another form, or not all of them."""
    if list(checkpoint.glob("pytorch_model*.bin")):
        return (
            "pytorch_model.bin is a pickle, which can run code and is not opened here: load it with"
            " transformers and save_pretrained, or take a revision with safetensors"
        )
    if list(checkpoint.glob("consolidated*")):
        return (
            "consolidated files are in Mistral's own layout: fetch the repository's"
            " model-*.safetensors, or convert them with transformers'"
            " convert_mistral_weights_to_hf.py"
        )
    return "fetch what is missing"


def check_shards(checkpoint: Path) -> None:
    """Every shard is as long as its header says; no weight is read.

    Raises:
        StageError: a shard is missing, damaged, or not a safetensors file.
    """
    tensors.stored(weight_files(checkpoint))


def check_whole(checkpoint: Path, facts: ModelShape) -> None:
    """The folder holds one model, whole, as its config.json describes it; headers are read only.

    Args:
        facts: of `read_shape` on the folder.
    Raises:
        StageError: files are missing or damaged, or tensors are missing, extra, or of another
            shape or type.
    """
    shards = weight_files(checkpoint)
    single = checkpoint / "model.safetensors"
    if single.is_file() and single not in shards:
        raise StageError(
            "the folder holds two models",
            where=checkpoint,
            found=f"{single.name}, and model.safetensors.index.json with {len(shards)} shards of"
            " its own",
            expected="one of them: transformers takes the first, llama.cpp's converter the index",
            to_fix=f"move {single.name} away, or the index with its shards",
        )
    tensors.check_tensors(shards, facts, where=checkpoint)


def default_device() -> device:
    """This process's CUDA device (torchrun counts processes in `LOCAL_RANK`), else the CPU.

    Raises:
        StageError: the job was given a GPU that PyTorch, built for CUDA, cannot use. On a CPU it
            would take days and say nothing.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    has_driver = any(path.exists() for path in DRIVERS)
    if torch.version.cuda and has_driver and given not in NO_GPUS:
        raise StageError(
            "the job was given a GPU, and PyTorch cannot use it",
            where="CUDA_VISIBLE_DEVICES",
            found=f"{given}; torch {torch.__version__}",
            expected="a driver for its CUDA; a number that nvidia-smi lists",
            to_fix=DOCTOR,
        )
    return torch.device("cpu")


def check_bitsandbytes(device: device) -> None:
    """
    Raises:
        StageError: bitsandbytes has no library for this kind of device.
    """
    from bitsandbytes.cextension import lib

    if device.type == "cuda" and not getattr(lib, "compiled_with_cuda", False):
        raise StageError(
            "bitsandbytes cannot quantize on this GPU",
            where="bitsandbytes",
            found="its library for CUDA is not loaded",
            expected="one for the CUDA that PyTorch was built with",
            to_fix=DOCTOR,
        )


def load_model(
    checkpoint: Path,
    *,
    window: int | None,
    precision: Precision,
    rope: RopeParameters | None = None,
    attention: str = "sdpa",
    device: str | None = None,
) -> PreTrainedModel:
    """A causal language model, on this process's GPU where there is one.

    A model packed by quantize_awq is loaded as what its weights stand for (`awq_weights`).
    A mixture's experts are quantized too; on its way to NF4 the whole model is in the CPU's memory
    in 16 bits (Mixtral 8x7B: 93 GB).

    Args:
        checkpoint: folder with config.json and safetensors.
        window: the model's sliding window (facts.json), set explicitly; None is full causal
            attention.
        precision: of weights and arithmetic; `nf4` and `int8` quantize the linear layers on loading
            (bitsandbytes; NF4 with double quantization), the arithmetic in bfloat16 on a GPU that
            has it, float16 on one that has not, float32 on a CPU.
        rope: `rope_parameters` of facts.json, where they are not the checkpoint's own.
        attention: transformers' name of the attention implementation.
        device: name of a torch device; None is `default_device`.
    Raises:
        MemoryError, RuntimeError: the memory ran out (`exhaustion.exhausts_memory`).
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    place = torch.device(device) if device else default_device()
    config = model_config(checkpoint, window=window, rope=rope)
    if is_packed(checkpoint):
        from workflow_scripts.models import awq_weights

        if precision in ("int8", "nf4"):
            raise StageError(
                "the model is quantized already",
                where=f"{checkpoint / 'config.json'}, quantization_config",
                found=f"precision {precision}",
                expected="native",
            )
        return awq_weights.load(
            config,
            weight_files(checkpoint),
            dtype=getattr(torch, precision),
            attention=attention,
            device=place,
        )
    compute = compute_dtype(place)
    if precision in ("nf4", "int8"):
        check_bitsandbytes(place)
    quantizations: dict[str, dict[str, Any]] = {  # arguments of transformers' class
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
        },
        "int8": {"load_in_8bit": True},
    }
    quantization = quantizations.get(precision)
    # A mixture's experts do not fit a GPU in 16 bits: they get there layer by layer, quantized.
    has_experts = precision == "nf4" and getattr(config, "num_local_experts", None) is not None
    loads_to = torch.device("cpu") if has_experts else place
    with exhaustion.of_loading():
        # Type checkers do not see what `to` takes, nor what the modules of a model are.
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=compute if quantization else getattr(torch, precision),
            attn_implementation=attention,
            device_map={"": loads_to},
            quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
        )
    if has_experts:
        from workflow_scripts.models.experts import quantize_experts

        quantize_experts(model, place)
        model.to(place)
        model.hf_device_map = {"": place}  # which accelerate holds to
    for layer in model.modules():
        # On CPUs with AVX512-BF16 one forward pass in eval mode makes bitsandbytes 0.50 repack a
        # layer for inference, for good: bfloat16 arithmetic, and no gradient through the layer
        # ever after.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def model_config(
    checkpoint: Path, *, window: int | None, rope: RopeParameters | None = None
) -> PreTrainedConfig:
    """transformers' config of a checkpoint, with the window and positions that the facts name.

    Args:
        window: keys a query sees; None is full causal attention.
        rope: `rope_parameters` of facts.json, where they are not the checkpoint's own.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    config.sliding_window = window
    if rope:
        config.rope_parameters = dict(rope)
        # transformers' YaRN and dynamic NTK stop at the null that Mistral has here.
        if getattr(config, "head_dim", None) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def is_packed(checkpoint: Path) -> bool:
    """Whether the weights are packed in 4 bits already, as quantize_awq writes them."""
    quantization = files.read_json(checkpoint / "config.json").get("quantization_config") or {}
    return quantization.get("quant_method") == "awq"


def compute_dtype(device: device) -> dtype:
    """`native_precision` as a type of torch."""
    import torch

    return getattr(torch, native_precision(device))


def native_precision(device: device) -> Literal["bfloat16", "float16", "float32"]:
    """bfloat16 on a GPU that has it, float16 on one that has not, float32 on a CPU."""
    import torch

    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
