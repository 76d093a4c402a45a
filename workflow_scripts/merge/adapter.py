"""What training left on disk: for each weight it changes, how the new one is made of the base's.

- LoRA, as PEFT saves it: W + s·B·A, s = alpha ÷ rank (arXiv:2106.09685) or alpha ÷ √rank
  (rsLoRA, arXiv:2312.03732); rank and alpha of a module are those of the first pattern that matches
  the end of its name, as in PEFT.
- DoRA (arXiv:2402.09353): the same sum, each of its rows scaled to the length that was trained.
- A mixture's experts: one A and one B for all experts of a layer, ranks of A stacked expert by
  expert, those of B interleaved (PEFT 0.21, `ParamWrapper`).
- Whole tensors: layers that trained beside the adapter (`modules_to_save`), embeddings resized for
  new tokens, and all of them where `method: full` trained the model itself.

All arithmetic is float32.
"""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from workflow_scripts import files, log
from workflow_scripts.log import StageError
from workflow_scripts.merge.tensor_names import Part
from workflow_scripts.models import tensors

PREFIX = "base_model.model."
# Modules that PEFT takes for linear layers; a mixture's experts and router are parameters.
LINEAR = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj|lm_head"
)
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}
# What changes the arithmetic and is not built here: refuse it rather than merge it wrongly.
UNSUPPORTED = (
    "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config",
)  # fmt: skip
# Initializations that also change the base: B·A alone is not the difference to it.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva")


class Factors(NamedTuple):
    """Where A and B of one parameter are, and by which name PEFT finds their rank and alpha."""

    stem: str
    pattern_name: str


class _OfThread(threading.local):
    """What an adapter keeps between two slabs, for each thread that merges."""

    part: Part | None = None
    factors: tuple[torch.Tensor, torch.Tensor]
    room: torch.Tensor = torch.empty(0)


class Adapter:
    """Merged weights, by the names of the model's parameters.

    Attributes:
        targets: parameters it changes.
        whole: those of them whose new weight it holds.
        magnitudes: those of them that DoRA gave the length of each row.
        keeps_ties: embeddings that are the output layer too trained as one.
    Args:
        folder: adapter_config.json and adapter_model.safetensors.
    Raises:
        StageError: it is neither LoRA nor a full fine-tune, has parts that are not merged here, or
            its file is damaged or lacks half of a pair.
    """

    def __init__(self, folder: Path) -> None:
        self._config = files.read_json(folder / "adapter_config.json")
        self._path = folder / "adapter_model.safetensors"
        is_full = self._config.get("method") == "full"
        if not is_full:
            _check_config(self._config, folder / "adapter_config.json")
        self._is_full = is_full
        headers = tensors.stored([self._path])
        tensors.check_types(headers)
        self._check_pairs(headers)
        self._tensors = safe_open(self._path, framework="pt")
        stored = set(self._tensors.keys())
        self._factors = {} if is_full else self._find_factors(stored)
        factored = {
            f"{factors.stem}.{name}"
            for factors in self._factors.values()
            for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        }
        self._whole: dict[str, str] = {
            name if is_full else name.removeprefix(PREFIX): name
            for name in stored - factored
            if is_full or self._is_saved_module(name)
        }
        unknown = stored - factored - set(self._whole.values())
        if unknown:
            raise StageError(
                "the adapter holds tensors that are not merged here",
                where=self._path,
                found=", ".join(sorted(unknown)[:10]),
                expected="lora_A, lora_B, lora_magnitude_vector, embeddings, or a module of"
                " modules_to_save",
            )
        self.targets: set[str] = self._factors.keys() | self._whole.keys()
        self.whole: set[str] = set(self._whole)
        self.magnitudes: set[str] = {
            name
            for name, factors in self._factors.items()
            if f"{factors.stem}.lora_magnitude_vector" in stored
        }
        self.keeps_ties: bool = (
            is_full
            or bool(self._config.get("ensure_weight_tying"))
            # Saved because they were resized; of `modules_to_save` each may have trained apart.
            or (EMBEDDINGS <= self._whole.keys() and not self._config.get("modules_to_save"))
        )
        self._own = _OfThread()
        for factors in self._factors.values():
            self._check_rank(factors, headers)

    def scale(self, name: str) -> float:
        """alpha ÷ rank, or alpha ÷ √rank, of a module (or an expert parameter) by its full
        name."""
        alpha = _matching(self._config.get("alpha_pattern"), name, self._config["lora_alpha"])
        rank = self._rank(name)
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def scale_of(self, part: Part) -> float:
        """`scale` of a parameter."""
        return self.scale(self._factors[part.parameter].pattern_name)

    def n_experts(self, parameter: str) -> int:
        """How many experts a fused parameter's A is stacked of."""
        stem, name = self._factors[parameter]
        shape = self._tensors.get_slice(f"{stem}.lora_A.weight").get_shape()
        return shape[0] // self._rank(name)

    def delta(self, part: Part, rows: slice = slice(None)) -> torch.Tensor:
        """(rows, in) float32: s·B·A of a parameter, or of the part of it.

        In memory of the adapter's own, valid until the thread asks for the next: new memory for
        each would cost more than the product, as the kernel clears it page by page.
        """
        down, up = self.factors(part)
        up = up[rows]
        n_elements = len(up) * down.shape[1]
        if n_elements > len(self._own.room):
            self._own.room = torch.empty(n_elements)
        product = self._own.room[:n_elements].view(len(up), -1)
        torch.mm(up, down, out=product)
        return product.mul_(self.scale_of(part))

    def replaces(self, part: Part) -> bool:
        """Whether the part trained whole, and takes the base's place."""
        return part.parameter in self._whole

    def merged(self, part: Part, base: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a weight that the adapter adds to, float32, valid until the thread asks for the
        next.

        Args:
            part: one of `targets`, or a part of it, whose shape was checked.
            base: these rows of its weight in the base model; only read.
        """
        weight = self.delta(part, rows).add_(base)
        if part.parameter not in self.magnitudes:
            return weight
        magnitude = f"{self._factors[part.parameter].stem}.lora_magnitude_vector"
        length = torch.linalg.norm(weight, dim=1)
        return (self._tensors.get_tensor(magnitude)[rows].float() / length)[:, None] * weight

    def shape(self, part: Part) -> tuple[int, ...]:
        """What the part's weight must have in the base, but that embeddings may have grown.

        Raises:
            StageError: the adapter has fewer experts than the part's.
        """
        if part.parameter in self._whole:
            shape = self._tensors.get_slice(self._whole[part.parameter]).get_shape()
            if part.expert is None:
                return tuple(shape)
            n_experts, n_rows, n_columns = shape
        else:
            stem = self._factors[part.parameter].stem
            n_rows = self._tensors.get_slice(f"{stem}.lora_B.weight").get_shape()[0]
            n_columns = self._tensors.get_slice(f"{stem}.lora_A.weight").get_shape()[1]
            n_experts = self.n_experts(part.parameter)
        if part.expert is not None and part.expert >= n_experts:
            raise self._misfit(part, f"{n_experts} experts", f"expert {part.expert}")
        return (n_rows if part.half is None else n_rows // 2, n_columns)

    def check_complete(self, parameters: set[str]) -> None:
        """Every module that the adapter's config names is in its file, in every layer.

        Args:
            parameters: of the base.
        Raises:
            StageError: naming the first ten that are missing.
        """
        missing = sorted(self._named(parameters) - self.targets)
        if missing:
            shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
            raise StageError(
                "the adapter lacks modules that its adapter_config.json names",
                where=self._path,
                found=f"nothing for {len(missing)}: {shown}",
                expected="every weight of the base"
                if self._is_full
                else "target_modules,"
                " target_parameters and modules_to_save in every layer of layers_to_transform",
                to_fix="fetch the adapter again, or save it again with PEFT: file and config must"
                " belong together",
            )

    def _named(self, parameters: set[str]) -> set[str]:
        """Those of the base's parameters that the adapter's config names.

        Source: PEFT 0.21, `check_target_module_exists` in tuners/tuners_utils.py.
        """
        if self._is_full:
            tied = EMBEDDINGS if EMBEDDINGS & self.targets else set()
            return {name for name in parameters - tied if not tensors.is_position_table(name)}
        config = self._config
        layers = config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        named = set()
        for name in parameters:
            module = name.removesuffix(".weight")
            if _is_of(module, config.get("modules_to_save")):
                named.add(name)
            if any(name.endswith(f".{target}") for target in config.get("target_parameters") or []):
                named.add(name)
            linear = LINEAR.fullmatch(module)
            if linear is None or _is_of(module, config.get("exclude_modules")):
                continue
            if layers and linear["layer"] and int(linear["layer"]) not in layers:
                continue
            targets = config.get("target_modules")
            is_every = targets == "all-linear" and module != "lm_head"
            if is_every or _is_of(module, targets):
                named.add(name)
        return named

    def _check_pairs(self, headers: dict[str, tensors.Stored]) -> None:
        """Every A has its B, and with DoRA its magnitudes.

        Raises:
            StageError: naming the first ten that are missing.
        """
        stems = [
            name.removesuffix(".lora_A.weight")
            for name in headers
            if name.endswith(".lora_A.weight")
        ]
        needed = ["lora_B.weight"]
        if self._config.get("use_dora"):
            needed.append("lora_magnitude_vector")
        missing = sorted(
            f"{stem}.{name}" for stem in stems for name in needed if f"{stem}.{name}" not in headers
        )
        if missing:
            raise StageError(
                "the adapter is not whole",
                where=self._path,
                found=f"no {', '.join(missing[:10])}",
                expected="lora_A and lora_B of every module, with DoRA its magnitudes too",
                to_fix="fetch the adapter again, or save it again with PEFT",
            )

    def _check_rank(self, factors: Factors, headers: dict[str, tensors.Stored]) -> None:
        """
        Raises:
            StageError: A and B have not the rank that the adapter's config says, or DoRA's
                magnitudes are not one per row.
        """
        stem = factors.stem
        where = f"{self._path}, {stem}"
        down, up = (headers[f"{stem}.lora_{name}.weight"].shape for name in "AB")
        rank = self._rank(factors.pattern_name)
        # Of a mixture's experts all are stacked.
        n_stacked = down[0] // rank if ".experts" in stem else 1
        if (len(down), len(up)) != (2, 2) or not down[0] == up[1] == rank * n_stacked:
            raise StageError(
                "the adapter's matrices have another rank than its adapter_config.json says",
                where=where,
                found=f"A {list(down)}, B {list(up)}",
                expected=f"rank {rank}: A [{rank}, in], B [out, {rank}]",
                to_fix="take file and config from the same adapter: its scale is alpha ÷ rank",
            )
        magnitudes = headers.get(f"{stem}.lora_magnitude_vector")
        if magnitudes is not None and magnitudes.shape != (up[0],):
            raise StageError(
                "the adapter has another number of magnitudes than rows",
                where=where,
                found=list(magnitudes.shape),
                expected=[up[0]],
                to_fix="fetch the adapter again, or save it again with PEFT",
            )

    def check_shape(self, part: Part, base: tuple[int, ...]) -> None:
        """
        Raises:
            StageError: the part has another shape in the base.
        """
        found = self.shape(part)
        has_grown = (
            part.parameter in EMBEDDINGS and found[0] > base[0] and found[1:] == tuple(base[1:])
        )
        if found != tuple(base) and not has_grown:
            raise self._misfit(part, found, tuple(base))

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of embeddings that trained, or were saved, whole; None where none were.

        Raises:
            StageError: embeddings and output layer differ.
        """
        sizes = {
            name: self.shape(Part(name))[0] for name in sorted(EMBEDDINGS & self._whole.keys())
        }
        if len(set(sizes.values())) > 1:
            raise StageError(
                "the adapter's embeddings and its output layer have not the same rows",
                where=self._path,
                found=log.fields(sizes),
                expected="one size of the vocabulary",
            )
        return next(iter(sizes.values()), None)

    def factors(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of a part, float32; of the last one asked for, kept."""
        if self._own.part == part:
            return self._own.factors
        stem, name = self._factors[part.parameter]
        down = self._tensors.get_tensor(f"{stem}.lora_A.weight").float()
        up = self._tensors.get_tensor(f"{stem}.lora_B.weight").float()
        if part.expert is not None:
            rank = self._rank(name)
            first = part.expert * rank
            down = down[first : first + rank]
            up = up.reshape(len(up), rank, -1)[:, :, part.expert]
        if part.half is not None:
            up = up.chunk(2)[part.half]
        self._own.part, self._own.factors = part, (down, up)
        return down, up

    def _rank(self, name: str) -> int:
        return _matching(self._config.get("rank_pattern"), name, self._config["r"])

    def stored(self, part: Part, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of what trained whole, read alone: the experts of a layer are gigabytes."""
        tensor = self._tensors.get_slice(self._whole[part.parameter])
        if part.expert is None:
            return tensor[rows]
        n_rows = tensor.get_shape()[1]
        first, end, _ = rows.indices(n_rows if part.half is None else n_rows // 2)
        offset = (part.half or 0) * (n_rows // 2)
        return tensor[part.expert, offset + first : offset + end]

    def _is_saved_module(self, name: str) -> bool:
        """Of `modules_to_save`, or embeddings: PEFT saves these by itself once they have been
        resized."""
        if name.removeprefix(PREFIX) in EMBEDDINGS:
            return True
        module = name.removeprefix(PREFIX).removesuffix(".weight")
        saved = self._config.get("modules_to_save") or []
        if saved and self._config.get("ensure_weight_tying"):
            saved = [*saved, "embed_tokens", "lm_head"]  # PEFT names one of the two, stores both
        return any(module == name or module.endswith(f".{name}") for name in saved)

    def _find_factors(self, stored: set[str]) -> dict[str, Factors]:
        """A and B by the parameter they change."""
        found: dict[str, Factors] = {}
        experts: dict[str, list[str]] = {}
        for name in sorted(stored):
            if not name.endswith(".lora_A.weight"):
                continue
            stem = name.removesuffix(".lora_A.weight")
            module = stem.removeprefix(PREFIX).replace(".base_layer", "")
            if module.endswith(".mlp.experts"):
                experts.setdefault(module, []).append(stem)
            elif module.endswith(".mlp.gate"):  # the router: no module of PEFT's, a parameter
                found[f"{module}.weight"] = Factors(stem, f"{module}.weight")
            else:
                found[f"{module}.weight"] = Factors(stem, module)
        for module, stems in experts.items():
            for fused, stem in zip(self._fused(stems), stems, strict=True):
                found[f"{module}.{fused}"] = Factors(stem, f"{module}.{fused}")
        return found

    def _fused(self, stems: list[str]) -> list[str]:
        """Which of a layer's two expert parameters each A and B belongs to.

        PEFT wraps one parameter around the other and keeps no name of them; but the way down takes
        what half of gate_up_proj's rows give.
        """
        named = {
            target.rpartition(".")[2] for target in self._config.get("target_parameters") or []
        } & {"gate_up_proj", "down_proj"}
        if len(stems) == len(named) == 1:
            return list(named)
        shapes = [
            (
                self._tensors.get_slice(f"{stem}.lora_B.weight").get_shape()[0],
                self._tensors.get_slice(f"{stem}.lora_A.weight").get_shape()[1],
            )
            for stem in stems
        ]
        for order in (["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]):
            shape = dict(zip(order, shapes, strict=False))
            if len(stems) == 2 and shape["gate_up_proj"] == (
                2 * shape["down_proj"][1],
                shape["down_proj"][0],
            ):
                return order
        raise StageError(
            "the adapter's experts have shapes that fit no mixture",
            where=f"{self._path}, {stems[0]}",
            found=shapes,
            expected="(2 · ffn, hidden) and (hidden, ffn)",
        )

    def _misfit(self, part: Part, found: object, expected: object) -> StageError:
        return StageError(
            "the adapter does not fit the base model",
            where=f"{self._path}, {part.parameter}",
            found=found,
            expected=f"{expected}, as in the base",
            to_fix="take the model that the adapter was trained on",
        )


def _is_of(module: str, wanted: str | list[str] | None) -> bool:
    """Whether PEFT takes a module for one that a config names: by the end of its name, or by a
    pattern of all of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in wanted or [])


def _check_config(config: dict[str, Any], path: Path) -> None:  # untyped: PEFT's JSON
    if config.get("peft_type") != "LORA":
        raise StageError(
            "the adapter is no LoRA",
            where=path,
            found=config.get("peft_type"),
            expected="LORA, or method: full",
        )
    used = [key for key in UNSUPPORTED if config.get(key)]
    used += [
        f"{key}: {value}"
        for key, value, known in (
            ("bias", config.get("bias", "none"), ("none",)),
            ("init_lora_weights", config.get("init_lora_weights", True), PLAIN_INITIALIZATIONS),
        )
        if value not in known
    ]
    if used:
        raise StageError(
            "the adapter has parts that are not merged here",
            where=path,
            found=", ".join(used),
            expected="LoRA, rsLoRA or DoRA, with experts and modules_to_save",
        )


def _matching(
    patterns: dict[str, Any] | None,  # untyped: PEFT's JSON
    name: str,
    default: Any,
) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
